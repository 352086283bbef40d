"""Run `textpolicy doctor` on small real runs, healthy or broken on purpose: one JSON row per run.

    OPENBLAS_NUM_THREADS=1 .venv/bin/python benchmarks/doctor.py [NAME ...] [--again] [--table]

A tiny model (tiny.py) trains for 30 steps, the built-in one for 9, each run in a process of its own. Rows are appended
to results/doctor.jsonl; a run that has one is skipped, unless --again says otherwise, so the whole can be stopped and
started. With --folders the run folders are kept, and those that are there are examined again instead of trained.
--table prints the tables of docs/doctor.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from machine import describe

from textpolicy.config.settings import check_config
from textpolicy.tasks import TASKS, Problem, Task, load_task

RESULTS = Path(__file__).parent / "results" / "doctor.jsonl"
Settings = dict[str, Any]
BASE: Settings = {
    "steps": 30,
    "rollout": {"prompts_per_step": 8, "group_size": 8, "max_tokens": 8},
    "optimizer": {"warmup_steps": 3, "learning_rate": 5e-3},
    "evaluation": {"every": 10, "problems": 150},
    "on_policy": {"every": 4},
    "machine": {"threads": 1},
}
EMBEDDED: Settings = {
    "model": "smollm2-135m",
    "steps": 9,
    "rollout": {"prompts_per_step": 5, "group_size": 6},
    "optimizer": {"warmup_steps": 2, "learning_rate": 3e-4},
    "evaluation": {"every": 5, "problems": 40},
    "on_policy": {"every": 3},
}


@dataclass(frozen=True)
class Case:
    """A run: what the doctor should find ("" is nothing), settings over BASE, a task, and what else is broken."""

    expected: str
    how: str
    settings: Settings
    task: Callable[[], Task]
    before: Callable[[], None] = lambda: None


# ---- problems and rewards

Pay = Callable[[str, dict[str, Any]], float | None]


def asked(question: Callable[[np.random.Generator], tuple[str, Any]], reward: Callable[..., Any]) -> Callable[[], Task]:
    """A task of such questions; its prompts are the bare text."""

    def task() -> Task:
        random = np.random.default_rng(0)
        problems = tuple(Problem(q, str(a)) for q, a in dict(question(random) for _ in range(1500)).items())
        parts = {"test": problems[:150], "validation": problems[150:300], "train": problems[300:]}
        return Task("doctor", "made up", prompt=lambda q: q, reward=reward, max_tokens=None, **parts)  # type: ignore[arg-type, return-value]

    return task


def largest(random: np.random.Generator) -> tuple[str, int]:
    prompt, numbers = tiny.question(random)
    return prompt, max(numbers)


def easy(random: np.random.Generator) -> tuple[str, str]:
    return tiny.question(random)[0], "any number"


def product(random: np.random.Generator) -> tuple[str, int]:
    a, b = (int(n) for n in random.integers(1000, 9999, 2))
    return f"{a}x{b}?", a * b


def mixed(random: np.random.Generator) -> tuple[str, int | str]:
    return easy(random) if random.random() < 0.5 else product(random)


def is_right(completion: str, example: dict[str, Any]) -> bool:
    return completion == example["answer"] or (example["answer"] == "any number" and bare(completion) == 1)


def bare(completion: str) -> float:
    return float(completion.isdecimal())


def paying(pay: Pay) -> Callable[..., Any]:
    """A reward that pays so, and says what is right."""

    def reward(prompt: str, completion: str, example: dict[str, Any], **_: Any) -> Any:
        paid = pay(completion, example)
        return None if paid is None else {"reward": paid, "is_correct": is_right(completion, example)}

    return reward


RIGHT = paying(lambda c, e: float(is_right(c, e)))
GRADED = paying(lambda c, e: 0.1 * bare(c) + 0.9 * is_right(c, e))


def tiny_task(pay: Pay) -> Callable[[], Task]:
    return asked(largest, paying(pay))


def embedded(reward: Callable[..., Any] | None = None, task: str = "largest") -> Callable[[], Task]:
    """A built-in task, with a reward of one's own or its own."""
    return lambda: load_task(task) if reward is None else replace(load_task(task), reward=reward)


def smallest(completion: str, example: dict[str, Any]) -> float:
    numbers = example["question"].replace("Largest of", "").replace(",", " ").rstrip("?").split()
    return float(completion == min(numbers, key=int)) + 0.1 * bare(completion)


def odd_only(completion: str, example: dict[str, Any]) -> float | None:
    return None if completion[-1:] in tuple("02468") else 0.1 + 0.9 * is_right(completion, example)


def form_and_answer() -> Task:
    """Being right, and a fifth of that for a number alone."""

    def right(prompt: str, completion: str, example: dict[str, Any], **_: Any) -> Any:
        return RIGHT(prompt, completion, example)

    def number(prompt: str, completion: str, example: dict[str, Any], **_: Any) -> float:
        return 0.2 * bare(completion)

    from textpolicy.rewards.scoring import Scorer

    return asked(largest, Scorer([right, number]))()


def two_parts(weight: float) -> Callable[[], Task]:
    """Being right, and so much times the number itself."""

    def right(prompt: str, completion: str, example: dict[str, Any], **_: Any) -> Any:
        return RIGHT(prompt, completion, example)

    def size(prompt: str, completion: str, example: dict[str, Any], **_: Any) -> float:
        return weight * min(int(completion), 99) if bare(completion) else 0.0

    from textpolicy.rewards.scoring import Scorer

    return asked(largest, Scorer([right, size]))


def sample_hotter() -> None:
    """A sampler that says temperature 1 and samples at 1.5."""
    from textpolicy.mlx.engine import MLXEngine

    sample = MLXEngine.sample

    def hotter(self: Any, prompts: Any, n: int, sampling: Any) -> Any:
        if sampling.temperature == 0:
            return sample(self, prompts, n, sampling)
        groups = sample(self, prompts, n, replace(sampling, temperature=1.5))
        return [[replace(completion, temperature=1.0) for completion in group] for group in groups]

    MLXEngine.sample = hotter  # type: ignore[method-assign]


# ---- the runs


def over(**sections: Any) -> Settings:
    """Settings laid over BASE, section by section."""
    return {
        name: {**BASE[name], **new} if name in BASE and isinstance(new, dict) else new for name, new in sections.items()
    }


def small(**sections: Any) -> Settings:
    """The same over EMBEDDED."""
    laid = {k: {**EMBEDDED[k], **v} if k in EMBEDDED and isinstance(v, dict) else v for k, v in sections.items()}
    return {**EMBEDDED, **laid}


GRADED_TASK, HARD = asked(largest, GRADED), asked(product, RIGHT)
HEALTHY: dict[str, Case] = {
    **{f"grpo-seed{seed}": Case("", "GRPO", over(seed=seed), GRADED_TASK) for seed in range(5)},
    **{
        name: Case("", "another algorithm", over(algorithm={"name": name}), GRADED_TASK)
        for name in ("gspo", "dr_grpo", "rloo", "dapo", "maxrl", "gtpo")
    },
    "dora": Case("", "another adapter", over(adapter={"kind": "dora"}), GRADED_TASK),
    "two-updates": Case("", "two updates per step", over(optimizer={"updates_per_step": 2}), GRADED_TASK),
    "kl": Case("", "a KL in the loss", over(algorithm={"kl": {"coefficient": 0.02}}), GRADED_TASK),
    "form-and-answer": Case("", "two rewards, for the answer and its form", {}, form_and_answer),
    "one-or-nothing": Case("", "1 for right answers, else 0", {}, asked(largest, RIGHT)),
    "curriculum": Case("", "prompts by pass rate", over(rollout={"curriculum": "pass_rate"}), GRADED_TASK),
    "smollm2-largest": Case("", "the built-in model and task, GRPO", small(), embedded()),
    "smollm2-gspo": Case("", "the same, GSPO, another seed", small(algorithm={"name": "gspo"}, seed=1), embedded()),
    "smollm2-addition": Case("", "the built-in model, addition", small(), embedded(task="addition")),
}
BROKEN: dict[str, Case] = {
    "constant": Case("reward_constant", "every completion earns 0.25", {}, tiny_task(lambda c, e: 0.25)),
    "too-hard": Case("all_fail", "products of four-digit numbers, 1 or 0", {}, HARD),
    "too-easy": Case("all_pass", "any number is right", {}, asked(easy, RIGHT)),
    "half-and-half": Case("groups_agree", "half of the prompts easy, half too hard", {}, asked(mixed, RIGHT)),
    "one-token": Case(
        "all_truncated", "one token for answers of two", over(rollout={"max_tokens": 1}), asked(largest, RIGHT)
    ),
    "prompt-only": Case(
        "no_gradient", "the reward looks at the prompt alone", {}, tiny_task(lambda c, e: int(e["answer"]) / 100)
    ),
    "all-masked": Case(
        "stop_never_learned",
        "two tokens, so none is left to stop with, and truncated completions masked",
        over(rollout={"max_tokens": 2}, algorithm={"mask_truncated": True}),
        tiny_task(lambda c, e: float(c[:1] == e["answer"][:1])),
    ),
    "unscored": Case("unscorable", "None for even numbers", {}, tiny_task(odd_only)),
    "resample-hard": Case(
        "short_batches", "resampling, and hardly a prompt is ever solved", over(algorithm={"resample": 2}), HARD
    ),
    "cut-off": Case(
        "truncation",
        "pays for laughter or for right answers, and laughter is cut off",
        over(optimizer={"learning_rate": 1e-3}),
        tiny_task(lambda c, e: float(c.startswith("ha") or is_right(c, e))),
    ),
    "hot": Case(
        "truncation",
        "temperature 3 and three tokens, so it rambles",
        over(rollout={"temperature": 3.0, "max_tokens": 3}),
        GRADED_TASK,
    ),
    "half-laughter": Case(
        "truncation",
        "pays for laughter about products, for right answers elsewhere",
        {},
        asked(
            lambda random: largest(random) if random.random() < 0.5 else product(random),
            paying(lambda c, e: float(c.startswith("ha") if "x" in e["question"] else is_right(c, e))),
        ),
    ),
    "pays-length": Case("stop_never_learned", "pays for every letter", {}, tiny_task(lambda c, e: len(c) / 8)),
    "pays-42": Case(
        "repeated_completions",
        "pays 1 for a leading 4 and half more for 42, whatever is asked",
        {},
        tiny_task(lambda c, e: (c[:1] == "4") + (c == "42") / 2),
    ),
    "pays-silence": Case("empty_completions", "pays for nothing", {}, tiny_task(lambda c, e: -float(len(c)))),
    "pays-laughter": Case(
        "looping_completions",
        "pays for every ha",
        over(rollout={"max_tokens": 60}),
        tiny_task(lambda c, e: c.count("ha") / 30),
    ),
    "two-rewards": Case("held_out_falls", "right (0 or 1) plus a 200th of the number", {}, two_parts(0.005)),
    "colder": Case("entropy_collapse", "temperature 0.01", over(rollout={"temperature": 0.01}), asked(largest, RIGHT)),
    "cold": Case("entropy_collapse", "temperature 0.05", over(rollout={"temperature": 0.05}), asked(largest, RIGHT)),
    "form-only": Case("format_without_answers", "products, and 0.1 for any number", {}, asked(product, GRADED)),
    "unlike-scales": Case("one_part_dominates", "right (0 or 1) plus the number itself (0 to 99)", {}, two_parts(1.0)),
    "hotter-sampler": Case(
        "on_policy_gap",
        "samples at temperature 1.5 and says 1",
        over(on_policy={"max_gap": 9.0}),
        GRADED_TASK,
        sample_hotter,
    ),
    "narrow-clip": Case(
        "clips_most",
        "a clip range of 0.00001 and 8 updates per step",
        over(algorithm={"clip_low": 1e-5, "clip_high": 1e-5}, optimizer={"updates_per_step": 8}),
        GRADED_TASK,
    ),
    "idle-updates": Case(
        "clips_nothing",
        "4 updates per step of learning rate 0.0000001",
        over(optimizer={"updates_per_step": 4, "learning_rate": 1e-7}),
        GRADED_TASK,
    ),
    "pays-smallest": Case("held_out_falls", "pays for the smallest number", {}, tiny_task(smallest)),
    "rate-high": Case("learning_rate_high", "learning rate 0.3", over(optimizer={"learning_rate": 0.3}), GRADED_TASK),
    "rate-low": Case(
        "learning_rate_low", "learning rate 0.0000001", over(optimizer={"learning_rate": 1e-7}), GRADED_TASK
    ),
    "smollm2-constant": Case(
        "reward_constant", "the built-in model, always 0.25", small(), embedded(paying(lambda c, e: 0.25))
    ),
    "smollm2-rate-high": Case(
        "learning_rate_high",
        "the built-in model, learning rate 0.03",
        small(optimizer={"learning_rate": 0.03}),
        embedded(),
    ),
    "smollm2-one-token": Case(
        "all_truncated",
        "the built-in model, one token for answers of two",
        small(rollout={"max_tokens": 1}),
        embedded(RIGHT),
    ),
}
CASES = {**HEALTHY, **BROKEN}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--again", action="store_true", help="run what has a row already, too")
    parser.add_argument("--table", action="store_true", help="run nothing and print the table")
    parser.add_argument("--folders", type=Path, default=Path(tempfile.mkdtemp()), help="where the run folders stay")
    given = parser.parse_args()
    for name in () if given.table else given.names or CASES:
        if given.again or name not in latest():
            row = measure(name, given.folders)
            print(
                f"{name}: expected {row['expected'] or 'nothing'}, found {', '.join(row['found']) or 'nothing'}",
                flush=True,
            )
    print(table())


def train(name: str, folder: Path) -> None:
    """The run ``name``; what it needs is slow to start, so it is imported here."""
    import textpolicy.mlx  # noqa: F401  (before mlx, which thereby gets its fast BLAS)
    from textpolicy.run import assembly
    from textpolicy.run import training_run as runs

    case = CASES[name]
    TASKS["doctor"] = case.task
    case.before()
    settings = {**BASE, **case.settings}
    if "model" not in settings:
        assembly.build_engine = tiny_engine
    runs.run(check_config({**settings, "task": "doctor", "output": folder}, name))


def apart(work: Callable[[], None]) -> int:
    """Do ``work`` in a fork of this process, which has imported everything and computed nothing; its exit code."""
    import textpolicy.mlx.adapters.merging
    import textpolicy.run.summary
    import textpolicy.run.training_run  # noqa: F401

    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        work()
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def tiny_engine(config: Any, recipe: Any) -> tuple[Any, Any]:
    """As ``textpolicy.run.assembly.build_engine``, with the tiny model."""
    from textpolicy.mlx.adapters.merging import attach
    from textpolicy.mlx.engine import MLXEngine

    model, tokenizer = tiny.load(), tiny.Tokenizer()
    attach(model, config.adapter.chosen(), config.seed)
    o = config.optimizer
    return MLXEngine(
        model, stop=tokenizer.eos_token_ids, weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm
    ), tokenizer


def measure(name: str, folders: Path) -> dict[str, Any]:
    """Train ``name``, unless its folder is there, and examine it; its row is written before it is returned."""
    from textpolicy.doctor import examine

    case, folder = CASES[name], folders / name
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        if apart(lambda: train(name, folder)):
            raise SystemExit(f"the run {name} failed; what it said is above")
        (folder / "seconds").write_text(str(time.perf_counter() - started))
    report, summary = examine(folder), json.loads((folder / "summary.json").read_text())
    row = {
        "benchmark": "doctor",
        "name": name,
        "how": case.how,
        "expected": case.expected,
        "found": [finding.name for finding in report.findings],
        "evidence": {finding.name: dict(finding.evidence) for finding in report.findings},
        "said": [finding.what for finding in report.findings],
        "blind": [rule for rule, _ in report.blind],
        "steps": report.steps,
        "test_before": summary["test_before"],
        "test_after": summary["test_after"],
        "seconds": float((folder / "seconds").read_text()),
        **describe(),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def latest() -> dict[str, dict[str, Any]]:
    """The last row of every run that has one."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    found = {row["name"]: row for row in rows}
    return {name: found[name] for name in CASES if name in found}


def table() -> str:
    """The runs and what was found of them, and how often that was right, as Markdown."""
    rows = latest()
    lines = [
        "| run | what is done to it | should be found | found besides | accuracy on test problems |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        besides = [found for found in row["found"] if found != row["expected"]]
        verdict = (
            "nothing"
            if not row["expected"]
            else f"{row['expected']}: {'yes' if row['expected'] in row['found'] else '**no**'}"
        )
        accuracy = f"{row['test_before']:.0%} to {row['test_after']:.0%}"
        lines.append(f"| {name} | {row['how']} | {verdict} | {', '.join(besides) or '-'} | {accuracy} |")
    return "\n".join([*lines, "", *confusion(rows)])


def confusion(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Runs by what they are and what was said of them."""
    healthy = [row for row in rows.values() if not row["expected"]]
    broken = [row for row in rows.values() if row["expected"]]
    silent = sum(not row["found"] for row in broken)
    named = sum(row["expected"] in row["found"] for row in broken)
    clean = sum(not row["found"] for row in healthy)
    return [
        "| | nothing found | its own defect found | only others found |",
        "|---|---|---|---|",
        f"| healthy ({len(healthy)}) | {clean} | - | {len(healthy) - clean} |",
        f"| broken ({len(broken)}) | {silent} | {named} | {len(broken) - silent - named} |",
    ]


if __name__ == "__main__":
    main()
