"""Compare what teaches a model: rewards alone, demonstrations first, or a teacher that judges every token.

    .venv/bin/python benchmarks/stages.py distil [--teacher RUN] [--beta 0] [--steps 64] [--seeds 0 1 2]
    .venv/bin/python benchmarks/stages.py sft [--task addition] [--steps 100] [--share 0.25] [--seeds 0 1 2]
    .venv/bin/python benchmarks/stages.py sft --steps 4 --problems 8 --seeds 0            (a small form, in minutes)

``distil``: the teacher is the run RUN, or one of GRPO on the embedded task that is trained first with the first seed.
Each seed then distils it into the base in half of its steps, so that about half as many tokens are sampled, by the
sampled tokens alone, or with ``beta`` by the teacher's whole distribution at each. ``sft``: a run of rewards alone
against one whose first ``share`` of the steps learns demonstrations; these take less time, so rows have the seconds of
both. A row per seed is appended to benchmarks/results/stages.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from machine import describe

from textpolicy.config.settings import check_config
from textpolicy.run.training_run import run

RESULTS = Path(__file__).parent / "results" / "stages.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["distil", "sft"])
    parser.add_argument("--teacher", type=Path, help="a finished run; by default one is made")
    parser.add_argument("--beta", type=float, help="from forward KL, 0, to reverse KL, 1")
    parser.add_argument("--task", default="addition")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.25, help="of the steps that learn demonstrations")
    parser.add_argument("--alone", type=int, help="steps of rewards alone; by default as many as with demonstrations")
    parser.add_argument("--problems", type=int, default=0, help="of each split in an evaluation; 0 is all")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = (distils if asked.what == "distil" else sfts)(asked, Path(folder))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"benchmark": "stages", **row, **describe()}) + "\n")
    gains = [row["points"] for row in rows]
    print(f"{asked.what}: {statistics.median(gains):+.1f} points, the median of {len(gains)}; {gains}")


def distils(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Held-out points of the student above the teacher, and what each sampled."""
    asked.task = "largest"
    teacher = asked.teacher or made(asked, folder / "teacher", asked.seeds[0])
    taught = result(teacher)
    stage = {"kind": "distill", "steps": max(1, asked.steps // 2), "teacher": str(teacher)}
    stage |= {} if asked.beta is None else {"beta": asked.beta}
    rows = []
    for seed in asked.seeds:
        student = result(made(asked, folder / f"student{seed}", seed, [stage]))
        rows.append(compared("distil", asked, seed, student, taught))
    return rows


def sfts(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Held-out points of demonstrations and then rewards above rewards alone."""
    first = max(1, round(asked.share * asked.steps))
    stages = [{"kind": "sft", "steps": first}, {"kind": "rl", "steps": asked.steps - first}]
    rows = []
    for seed in asked.seeds:
        alone = result(
            made(asked, folder / f"alone{seed}", seed, [{"kind": "rl", "steps": asked.alone or asked.steps}])
        )
        both = result(made(asked, folder / f"both{seed}", seed, stages))
        rows.append(compared("sft", asked, seed, both, alone))
    return rows


def made(asked: argparse.Namespace, folder: Path, seed: int, stages: list[Any] | None = None) -> Path:
    """Train, and return the run's folder."""
    values: dict[str, Any] = {
        "model": asked.model, "task": asked.task, "seed": seed, "output": str(folder), "quiet": True,
        "rollout": {"prompts_per_step": asked.prompts}, "optimizer": {"warmup_steps": 1},
        "evaluation": {"every": 10**6, "problems": asked.problems},
    }  # fmt: skip
    return run(check_config({**values, **({"stage": stages} if stages else {"steps": asked.steps})}, "benchmark"))


def result(folder: Path) -> dict[str, float]:
    """The held-out accuracy of a finished run, and what it cost."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, summary = [row for row in rows if row["kind"] == "train"], json.loads((folder / "summary.json").read_text())
    return {
        "accuracy": summary["test_after"],
        "before": summary["test_before"],
        "sampled_tokens": sum(row["sampled_tokens"] for row in steps),
        "seconds": sum(row["sample_seconds"] + row["update_seconds"] for row in steps),
    }


def compared(
    what: str, asked: argparse.Namespace, seed: int, one: dict[str, float], other: dict[str, float]
) -> dict[str, Any]:
    settings = {
        name: getattr(asked, name)
        for name in ("model", "task", "steps", "share", "alone", "beta", "problems", "prompts")
    }
    points = 100 * (one["accuracy"] - other["accuracy"])
    return {"what": what, "seed": seed, **settings, "one": one, "other": other, "points": points}


if __name__ == "__main__":
    main()
