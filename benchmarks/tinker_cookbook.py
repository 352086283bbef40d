"""Recipes of the tinker-cookbook, unmodified, against ``textpolicy serve`` on this machine: one JSON row per run.

    python -m venv COOKBOOK
    COOKBOOK/bin/pip install 'tinker>=0.38' torch transformers datasets chz blobfile math-verify pillow pyrage \\
        pylatexenc sympy termcolor tiktoken
    COOKBOOK/bin/pip install --no-deps tinker-cookbook==0.6.1  # without tml-renderers, which only Inkling models need
    .venv/bin/python benchmarks/tinker_cookbook.py --python COOKBOOK/bin/python --recipes sums arithmetic

The model is the built-in one, and no hub is asked. Where other programs use the cores, OPENBLAS_NUM_THREADS=1 is ten
times faster. Rows are appended to benchmarks/results/tinker_cookbook.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from machine import describe

from textpolicy.cli.tinker_server import served_model

RESULTS = Path(__file__).parent / "results" / "tinker_cookbook.jsonl"
SERVER = [sys.executable, "-m", "textpolicy", "serve"]
CHATML = "qwen3_instruct"  # the cookbook's name for how the model's own conversations are written
START = 300.0  # seconds for a server to answer
LANGUAGES = {"DEVANAGARI": "hi", "GREEK": "el", "CYRILLIC": "ru", "CJK": "zh", "ARABIC": "ar"}  # by script


@dataclass(frozen=True)
class Recipe:
    """A program of the cookbook with the arguments that a small model and two cores need."""

    program: str  # a module, or a line of Python that hands a configuration to the recipe's own main
    arguments: str  # with {model}, {renderer}, {data}, {wheel}, {log}, and {sums}: what the recipe sums has trained
    figure: str  # the metric that is reported
    says: str = ""  # what the recipe has to say when it fails, as it has to
    rises: float | None = None  # by how much the figure has to rise


RL = "model_name={model} renderer_name={renderer} log_path={log} behavior_if_log_dir_exists=delete "
SL_BASIC = "import chz; from tinker_cookbook.recipes import sl_basic as r; r.main(chz.entrypoint(r.train.Config))"
SUPERVISED = (
    "model_name={model} renderer_name={renderer} log_path={log} learning_rate=5e-4 recipe_name=sl_basic "
    "dataset_builder=tinker_cookbook.supervised.data:FromConversationFileBuilder "
)
COMPARISONS = (
    "dataset_builder=tinker_cookbook.preference.dpo_datasets:DPODatasetBuilderFromComparisons "
    "dataset_builder.comparison_builder=tinker_cookbook.preference.preference_datasets:ComparisonBuilderFromJsonl "
    "dataset_builder.comparison_builder.train_path={data}/pairs.jsonl "
)
COMMON = (
    "dataset_builder.common_config.model_name_for_tokenizer={model} "
    "dataset_builder.common_config.renderer_name={renderer} dataset_builder.common_config.max_length=512 "
    "dataset_builder.common_config.batch_size="
)
REWARD = "env/all/reward/total"
RECIPES = {
    "sums": Recipe(
        SL_BASIC,
        SUPERVISED + "max_steps=8 dataset_builder.file_path={data}/sums.jsonl " + COMMON + "32",
        "train_mean_nll",
    ),
    "arithmetic": Recipe(
        "tinker_cookbook.recipes.math_rl.train",
        RL + "env=arithmetic loss_fn=importance_sampling groups_per_batch=32 group_size=16 num_substeps=4 "
        "learning_rate=3e-4 max_tokens=5 max_steps=15 eval_every=0 save_every=0 load_checkpoint_path={sums}",
        REWARD,
        rises=0.3,
    ),
    "guess_number": Recipe(
        "tinker_cookbook.recipes.multiplayer_rl.guess_number.train",
        RL + "batch_size=2 group_size=4 learning_rate=5e-4 max_tokens=12 max_steps=2 eval_every=0 save_every=0",
        REWARD,
    ),
    "shorter": Recipe(
        "tinker_cookbook.recipes.preference.shorter.train",
        RL + "batch_size=2 group_size=4 learning_rate=5e-4 max_tokens=24 max_steps=2",
        "env/all/ac_tokens_per_turn",
    ),
    "prompt_distillation": Recipe(
        "tinker_cookbook.recipes.prompt_distillation.train",
        RL + "file_path={data}/languages.jsonl batch_size=16 learning_rate=5e-4 num_epochs=1 max_steps=3",
        "train_mean_nll",
    ),
    "sl_basic": Recipe(
        SL_BASIC,
        SUPERVISED + "max_steps=4 dataset_builder.file_path={wheel}/example_data/conversations.jsonl " + COMMON + "16",
        "train_mean_nll",
    ),
    "rubric": Recipe(
        "tinker_cookbook.recipes.rubric.train",
        RL + "loss_fn=importance_sampling groups_per_batch=2 train_group_size=4 learning_rate=5e-4 max_tokens=8 "
        "max_steps=2 grader_llm_name={model} grader_renderer_name={renderer} eval_every=0 "
        "train_jsonl_path={data}/example_rubric_train.jsonl test_jsonl_path={data}/example_rubric_test.jsonl",
        REWARD,
    ),
    "dpo": Recipe(
        "import chz; from tinker_cookbook.preference import train_dpo as r; r.main(chz.entrypoint(r.Config))",
        "model_name={model} renderer_name={renderer} log_path={log} learning_rate=5e-4 recipe_name=dpo max_steps=3 "
        + COMPARISONS
        + COMMON
        + "16",
        "accuracy",
    ),
    "stable_reinforce": Recipe(
        "tinker_cookbook.recipes.math_rl.train",
        RL + "env=arithmetic groups_per_batch=2 group_size=4 max_steps=1",
        REWARD,
        says="importance_sampling",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="of the environment with the cookbook")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--renderer", default=CHATML)
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--folder", type=Path, help="of data, logs and checkpoints; a temporary one if not given")
    parser.add_argument("arguments", nargs="*", help="passed on to the recipes, after --")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.folder or Path(temporary)).resolve()
        (folder / "data").mkdir(parents=True, exist_ok=True)
        model = served_model(asked.model)
        wheel = Path(ask(asked.python, "import tinker_cookbook; print(tinker_cookbook.__path__[0])"))
        make_data(asked.python, wheel, folder / "data")
        named = {"model": model, "renderer": asked.renderer, "data": folder / "data", "wheel": wheel}
        with server(model, folder, asked.url) as url:
            failed = [name for name in asked.recipes if not run(name, asked, url, folder, named)]
    if failed:
        raise SystemExit(f"these recipes did not do what they have to: {', '.join(failed)}")


def run(name: str, asked: argparse.Namespace, url: str, folder: Path, named: dict[str, Any]) -> bool:
    """Run one recipe to its end, append its row, and return whether it did what it has to."""
    recipe, log = RECIPES[name], folder / name
    code = ["-c", recipe.program] if recipe.program.startswith("import ") else ["-m", recipe.program]
    taught = read(folder / "sums" / "checkpoints.jsonl").splitlines()
    sums = json.loads(taught[-1])["state_path"] if taught else None
    if "{sums}" in recipe.arguments and sums is None:
        raise SystemExit(f"{name} goes on from what the recipe sums has trained; name sums before it in --recipes")
    arguments = [a.format(**named, log=log, sums=sums) for a in recipe.arguments.split()] + asked.arguments
    given = {"HF_HUB_OFFLINE": "1", "TINKER_API_KEY": "tml-local", "TINKER_BASE_URL": url, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with (folder / f"{name}.log").open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [asked.python, *code, *arguments],
            cwd=folder,
            env={**without_python(), **given},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    seconds = time.perf_counter() - started
    metrics = [json.loads(line) for line in read(log / "metrics.jsonl").splitlines()]
    figures = [row[recipe.figure] for row in metrics if recipe.figure in row]
    said = read(folder / f"{name}.log").strip().splitlines()[-1:] if done.returncode else []
    if recipe.says:
        right = done.returncode != 0 and recipe.says in "".join(said)
    else:
        right = done.returncode == 0 and (recipe.rises is None or figures[-1] - figures[0] >= recipe.rises)
    row = {
        "benchmark": "tinker_cookbook",
        "recipe": name,
        "arguments": recipe.arguments.split() + asked.arguments,
        "renderer": asked.renderer,
        "figure": recipe.figure,
        "values": figures,
        "steps": len(figures),
        "seconds": seconds,
        "exit": done.returncode,
        "said": said,
        "right": right,
        "cookbook": ask(asked.python, "from importlib.metadata import version; print(version('tinker-cookbook'))"),
        "tinker": ask(asked.python, "from importlib.metadata import version; print(version('tinker'))"),
        **describe(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = f"{recipe.figure} {figures[0]:.3f} -> {figures[-1]:.3f}" if figures else "no figures"
    verdict = "ok" if right else "WRONG"
    print(f"{verdict} {name}: {len(figures)} steps, {shown}, {seconds:.0f} s {' '.join(said)}", flush=True)
    return right


@contextmanager
def server(model: Path, folder: Path, url: str | None) -> Iterator[str]:
    """Serve ``model`` on a free port until the block ends, or use the server at ``url``."""
    if url is not None:
        yield url
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [*SERVER, str(model), f"--port={port}", f"--folder={folder / 'server'}"]
    with (folder / "server.log").open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + START
            while not answers(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start: {read(folder / 'server.log')[-2000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/api/v1/healthz", timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


def make_data(python: Path, wheel: Path, data: Path) -> None:
    """Write the files of the recipes that read one: languages by script, sums with a grader, sums in two styles.

    A conversation of the recipe sums begins with the example that arithmetic puts before its questions.
    """
    rng = random.Random(0)
    sums = [(rng.randint(0, 100), rng.randint(0, 100)) for _ in range(64)]
    further = [(4, 5), *((rng.randint(0, 100), rng.randint(0, 100)) for _ in range(14 * 32))]
    said = [
        [{"role": "user", "content": f"What is {x} + {y}?"}, {"role": "assistant", "content": f"{x + y}"}]
        for x, y in further
    ]
    write_lines(data / "sums.jsonl", [{"messages": said[0] + turns} for turns in said[1:]])
    pairs = [
        {
            "comparison": {
                "prompt_conversation": [{"role": "user", "content": f"What is {x} + {y}?"}],
                "completion_A": [{"role": "assistant", "content": f"{x + y}"}],
                "completion_B": [{"role": "assistant", "content": f"The sum of {x} and {y} is {x + y}."}],
            },
            "label": "A",
        }
        for x, y in sums
    ]
    write_lines(data / "pairs.jsonl", pairs)
    texts = (wheel / "example_data" / "multilingual.txt").read_text(encoding="utf-8").splitlines()
    labelled = [(text[:80], LANGUAGES.get(script(text))) for text in texts]
    languages = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]}
        for text, label in labelled
        if label is not None
    ]
    write_lines(data / "languages.jsonl", rng.sample(languages, 64))
    made = "from tinker_cookbook.recipes.rubric.generate_data import generate_dataset as g; "
    ask(python, made + f"g(num_train=16, num_test=2, seed=42, write_dir={str(data)!r})")


def script(text: str) -> str:
    """Return the script of the first letter that is not Latin; of a text of Latin letters, LATIN."""
    scripts = [unicodedata.name(c, "LATIN").split()[0] for c in text if c.isalpha()]
    return next((s for s in scripts if s in LANGUAGES), "LATIN")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def ask(python: Path, code: str) -> str:
    done = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**without_python(), "HF_HUB_OFFLINE": "1"},
    )
    return done.stdout.strip().splitlines()[-1]


def without_python() -> dict[str, str]:
    """Return this process's environment without what would show our packages to another Python."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


if __name__ == "__main__":
    main()
