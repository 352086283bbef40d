"""Hostile files and texts: every reader answers, or refuses in one sentence; nothing else is raised.

    python tests/chaos/fuzz.py --executions 1000000 --record      all targets, in their shares
    python tests/chaos/fuzz.py --only gguf --executions 20000

Hypothesis makes the inputs: values for settings and rows, and changes to the bytes or the JSON of files that are sound.
That takes it longer than reading them, so most executions are of inputs crossed from four that it made.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT),
    *(str(ROOT / p) for p in ("benchmarks", "tests/chaos", "tests/rewards", "tests")),
]
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from textpolicy.errors import TextPolicyError  # noqa: E402

CHUNK = 100  # draws of one hypothesis test, which remembers all of them
PARENTS, CROSSED = 4, 196  # inputs of a draw, and those crossed from them
LONGEST_MESSAGE = 2_000  # characters


@dataclass
class Target:
    """What is fuzzed: ``call`` of every value of ``strategy``; it may raise TextPolicyError."""

    strategy: st.SearchStrategy[Any]
    call: Callable[[Any], Any]


# ---- values

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**30]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "\0", "../../etc/passwd", "\ud800", "nan", "a\nb", "'" * 9, "{{7*7}}", "lora", "x" * 500]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
TEXTS = st.one_of(
    st.text(max_size=120),
    st.text(alphabet="0123456789+-*/()=<>answer\\boxed{}frac$^_., \n", max_size=80),
    st.lists(
        st.sampled_from(
            (
                *"(){}+-*/=,0123 \n\0\u0663\ud800",
                "<answer>",
                "</answer>",
                "\\boxed{",
                "\\frac",
                "24",
                "**",
                "```python\n",
                "```",
                "1e999",
                "nan",
                "sun",
            )
        ),
        max_size=40,
    ).map("".join),
)


DO = ("flip", "write", "insert", "remove", "cut", "double")


@st.composite
def edits(draw: Any, many: int = 4) -> list[tuple[float, int, bytes]]:
    """Where in a file, from 0 to 1, which of DO to do there, and with which bytes."""
    do = st.integers(0, len(DO) - 1)
    some = st.binary(min_size=1, max_size=8) | st.sampled_from(
        [b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
    )
    return draw(st.lists(st.tuples(st.floats(0, 1), do, some), min_size=1, max_size=many))


def changed(data: bytes, how: list[tuple[float, int, bytes]], head: int | None = None) -> bytes:
    """``data`` with ``edits``, most of them in its first ``head`` bytes, where formats keep their sizes."""
    out = bytearray(data)
    for n, (place, do, some) in enumerate(how):
        within = len(out) if head is None or n % 4 == 3 else min(head, len(out))
        i = int(place * within)
        match DO[do % len(DO)]:
            case "flip" if i < len(out):
                out[i] ^= (some or b"\1")[0] or 1
            case "write":
                out[i : i + len(some)] = some
            case "insert":
                out[i:i] = some
            case "remove":
                del out[i : i + len(some)]
            case "cut":
                del out[i:]
            case "double":
                out[i:i] = out[max(0, i - 64) : i]
    return bytes(out)


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all that is in a JSON value."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(p for key, value in inside for p in nodes(value, (*path, key)))]


def regrown(tree: Any, changes: list[tuple[int, Any]]) -> Any:
    """A JSON value with some of its nodes replaced, or removed where the new value is None."""
    tree = copy.deepcopy(tree)
    for pick, value in changes:
        paths = nodes(tree)
        path = paths[pick % len(paths)]
        if not path:
            tree = value if pick % 50 == 0 else tree
            continue
        place = tree
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = copy.deepcopy(value)  # or a tree could come to hold itself
    return tree


def crossed(draw: random.Random, a: Any, b: Any) -> Any:
    """Something of both, of the same form."""
    match a, b:
        case (bool(), _) | (None, _):
            return draw.choice((a, b))
        case int(), int():
            return draw.choice((a, b, draw.randrange(300)))
        case float(), float():
            return draw.choice((a, b, draw.random()))
        case tuple(), tuple() if len(a) == len(b):
            return tuple(crossed(draw, x, y) for x, y in zip(a, b, strict=True))
        case list(), list():
            both = [*a, *b]
            some = draw.sample(both, draw.randint(min(1, len(both)), min(len(both), 6)))
            return [crossed(draw, x, draw.choice(both)) for x in some]
        case dict(), dict():
            return {k: crossed(draw, v, b.get(k, v)) for k, v in {**b, **a}.items() if draw.random() < 0.7}
        case (str(), str()) | (bytes(), bytes()):
            return a[: draw.randint(0, len(a))] + b[draw.randint(0, len(b)) :]
    return draw.choice((a, b))


CHANGES = st.lists(st.tuples(st.integers(0, 500), VALUES), min_size=1, max_size=4)


# ---- targets


def config(folder: Path) -> Target:
    """Settings as JSON or TOML would bring them, through the recipe and the adapter."""
    from textpolicy.config.recipe import configure
    from textpolicy.config.settings import Config, check_config
    from textpolicy.run.resume import leaves

    whole = json.loads(Config().model_dump_json())
    names = [name for name, _ in leaves(whole)]
    given_names = st.sampled_from(names) | st.text(max_size=10)

    def tree(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        root: dict[str, Any] = {}
        for name, value in pairs:
            place = root
            *above, last = name.split(".")
            for part in above:
                inner = place.setdefault(part, {})
                place = inner if isinstance(inner, dict) else place
            place[last] = value
        return root

    some = st.lists(st.tuples(given_names, VALUES), max_size=5).map(tree)
    return Target(some, lambda values: configure(check_config(values, "fuzz")))


def toml(folder: Path) -> Target:
    """A config file whose bytes were changed."""
    from textpolicy.config.settings import read_config

    sound, path = (ROOT / "examples" / "train.toml").read_bytes(), folder / "run.toml"

    def call(how: Any) -> None:
        path.write_bytes(changed(sound, how))
        read_config(path)

    return Target(edits(), call)


def rows(folder: Path) -> Target:
    """JSON lines, CSV and lists of grams: changed bytes and odd values."""
    from textpolicy.algorithms.grams import load_strategic_grams
    from textpolicy.analysis.mining import load_generations
    from textpolicy.environment.rows import read_rows

    line = json.dumps({"completion": "so let me check", "reward": 0.5, "prompt": "wh\u00e9n?", "n": [1, {"a": None}]})
    sound = "\n".join([line] * 3).encode()
    readers: list[tuple[Path, Callable[[Path], Any]]] = [
        (folder / "a.jsonl", read_rows),
        (folder / "a.csv", read_rows),
        (folder / "a.jsonl", load_generations),
        (folder / "a.json", load_strategic_grams),
    ]

    def call(given: tuple[int, list[Any], list[tuple[int, Any]]]) -> None:
        which, how, changes = given
        path, reader = readers[which % len(readers)]
        odd = json.dumps(regrown(json.loads(line), changes)).encode()
        path.write_bytes(changed(sound + b"\n" + odd, how) if how else odd)
        reader(path)

    return Target(st.tuples(st.integers(0, 3), edits() | st.just([]), CHANGES), call)


def graders(folder: Path) -> Target:
    """Completions, for every grader that runs in this process."""
    from graders_under_test import GRADERS

    here = [grade for name, grade in GRADERS.items() if name not in ("math_accuracy", "grade_math_answer")]

    def call(given: tuple[int, str]) -> None:
        here[given[0] % len(here)](given[1])

    return Target(st.tuples(st.integers(0, len(here) - 1), TEXTS), call)


def mathematics(folder: Path) -> Target:
    """Completions for the grader of mathematics, with its processes."""
    from textpolicy.rewards.math import extract_boxed, grade_math_answer

    return Target(TEXTS, lambda text: grade_math_answer(extract_boxed(text) or text, "\\frac{1}{2}", 0.5))


def checkpoints(folder: Path) -> Target:
    """Checkpoints of which a file was changed: never found sound unless they say the same."""
    from textpolicy.run.checkpoint import Checkpoints, UnsoundError, read

    state = {"seconds": {"all": 1.5}, "sepa": None, "streams": list(range(20))}
    written = Checkpoints(folder).write(1, state, lambda new: (new / "weights").write_bytes(bytes(range(256))) and None)
    files = [p for p in sorted(written.path.rglob("*")) if p.is_file()]
    sound = {p: p.read_bytes() for p in files}

    def call(given: tuple[int, Any]) -> None:
        file = files[given[0] % len(files)]
        file.write_bytes(changed(sound[file], given[1]))
        try:
            found = read(written.path)
        except UnsoundError:
            return
        finally:
            file.write_bytes(sound[file])
        assert found.state == state

    return Target(st.tuples(st.integers(0, 2), edits()), call)


def adapters(folder: Path) -> Target:
    """An adapter folder whose weights or config were changed, read and put on a model."""
    import textpolicy.mlx  # noqa: F401

    # isort: split
    from conftest import tiny_llama

    from textpolicy.config.adapters import LoRA, TinyLoRA
    from textpolicy.mlx.adapters.attach import attach, attached, detach
    from textpolicy.mlx.adapters.saving import CONFIG, WEIGHTS, load_adapter, read_adapter, save_adapter

    sound = []
    for n, kind in enumerate((LoRA(rank=2), TinyLoRA(u=3))):
        save_adapter(attach(tiny_llama(40), kind), folder / str(n))
        sound.append(((folder / str(n) / WEIGHTS).read_bytes(), json.loads((folder / str(n) / CONFIG).read_text())))
    model = tiny_llama(40)

    def call(given: tuple[int, list[Any], list[tuple[int, Any]], bool]) -> None:
        which, how, changes, put_on = given
        weights, settings = sound[which % 2]
        path = folder / str(which % 2)
        (path / WEIGHTS).write_bytes(changed(weights, how, head=2000) if how else weights)
        (path / CONFIG).write_text(json.dumps(regrown(settings, changes)))
        if not put_on:
            read_adapter(path)
            return
        try:
            load_adapter(model, path)
        finally:
            if attached(model) is not None:
                detach(model)
                model.freeze()

    return Target(st.tuples(st.integers(0, 1), st.just([]) | edits(), CHANGES | st.just([]), st.booleans()), call)


def safetensors(folder: Path) -> Target:
    """Safetensors files whose header or body was changed, and what mlx makes of those that pass."""
    import textpolicy.mlx  # noqa: F401

    # isort: split
    import mlx.core as mx
    import numpy as np
    from safetensors.numpy import save

    from textpolicy.mlx.files.safetensors import load_arrays

    sound = save({"a": np.zeros((3, 4), np.float32), "b": np.ones(5, np.float16), "c": np.zeros((), np.int64)})
    path = folder / "a.safetensors"

    def call(how: Any) -> None:
        path.write_bytes(changed(sound, how, head=220))
        mx.eval(*load_arrays(path, "save it again")[0].values())

    return Target(edits(), call)


def gguf(folder: Path) -> Target:
    """GGUF files whose bytes, most of them of the header, were changed."""
    from made_gguf import write

    from textpolicy.mlx.files.gguf import read_gguf

    sound, path = write(folder / "sound.gguf").read_bytes(), folder / "a.gguf"

    def call(how: Any) -> None:
        path.write_bytes(changed(sound, how, head=9000))
        read_gguf(path)

    return Target(edits(), call)


def models(folder: Path) -> Target:
    """A model's folder whose config or tokenizer was changed."""
    import textpolicy.mlx  # noqa: F401

    # isort: split
    from toy_run import make_model

    from textpolicy.mlx.models import load_model

    place = make_model(folder / "model")
    files = [place / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    sound = {p: p.read_bytes() for p in files}

    def call(given: tuple[int, list[Any], list[tuple[int, Any]]]) -> None:
        which, how, changes = given
        file = files[which % len(files)]
        odd = json.dumps(regrown(json.loads(sound[file]), changes)).encode()
        file.write_bytes(changed(odd, how) if how else odd)
        try:
            load_model(place)
        finally:
            file.write_bytes(sound[file])

    return Target(st.tuples(st.integers(0, 2), st.just([]) | edits(2), CHANGES | st.just([])), call)


SHARES: dict[str, tuple[Callable[[Path], Target], float]] = {
    "config": (config, 0.42),
    "toml": (toml, 0.02),
    "rows": (rows, 0.02),
    "graders": (graders, 0.5),
    "mathematics": (mathematics, 0.0001),
    "checkpoints": (checkpoints, 0.03),
    "adapters": (adapters, 0.003),
    "safetensors": (safetensors, 0.006),
    "gguf": (gguf, 0.0006),
    "models": (models, 0.0003),
}


def fuzz(name: str, executions: int, first_seed: int = 0) -> dict[str, Any]:
    """Run a target so many times; what came of it. Whatever it raises, but TextPolicyError, comes through."""
    make, _ = SHARES[name]
    done, refused, began = 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        target = make(Path(place))

        def once(value: Any) -> None:
            nonlocal done, refused
            done += 1
            try:
                target.call(value)
            except TextPolicyError as error:
                refused += 1
                output = str(error)
                assert "\n" not in output, f"more than one line: {output!r}"
                assert output.strip(), "an empty message"
                assert len(output) <= LONGEST_MESSAGE, f"{len(output)} characters: {output[:200]!r}"

        def family(parents: list[Any], number: int) -> None:
            draw = random.Random(number)
            for parent in parents:
                once(parent)
            for _ in range(min(CROSSED, executions - done)):
                once(crossed(draw, draw.choice(parents), draw.choice(parents)))

        parents = st.lists(target.strategy, min_size=PARENTS, max_size=PARENTS)
        chunk = 0
        while done < executions:
            how = settings(
                max_examples=min(CHUNK, max(1, (executions - done) // (PARENTS + CROSSED))),
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            before = done
            seed(first_seed * 1_000_003 + chunk)(how(given(parents, st.integers(0, 2**32))(family)))()
            chunk += 1
            if done == before:
                break
    return {"executions": done, "refused": refused, "seconds": round(time.perf_counter() - began, 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--only", choices=SHARES, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append a row for each to benchmarks/results/fuzz.jsonl")
    args = parser.parse_args(argv)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))  # a size that lies may not take the machine
    warnings.simplefilter("ignore")
    chosen = {name: SHARES[name][1] for name in args.only or SHARES}
    for name, share in chosen.items():
        count = fuzz(name, max(1, round(args.executions * share / sum(chosen.values()))), args.seed)
        row = {"benchmark": "fuzz", "target": name, "uncaught": 0, **count, "seed": args.seed}
        if args.record:
            from machine import describe

            with (ROOT / "benchmarks" / "results" / "fuzz.jsonl").open("a") as file:
                file.write(json.dumps({**row, **describe()}) + "\n")
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
