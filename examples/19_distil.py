"""Learn from a teacher token by token: an adapter that was trained on demonstrations teaches the model without it.

A teacher may be a run, another model of the same tokenizer, or the model itself with more to read. With ``beta`` a step
learns its whole distribution at each token that the student sampled; without, that token's signal q - l, how much
likelier it is to the teacher. Either is there also where all completions of a prompt are wrong and rewards say nothing.
"""

import json
import sys
from pathlib import Path
from typing import Any

from textpolicy.config.settings import Config
from textpolicy.run.training_run import run


def main(steps: int = 12, problems: int = 40) -> None:
    teacher = trained(
        "runs/teacher", problems, {"kind": "sft", "steps": 2 * steps, "rollout": {"prompts_per_step": 16}}
    )
    student = trained(
        "runs/student", problems, {"kind": "distill", "steps": steps, "teacher": str(teacher), "beta": 0.0}
    )
    rows = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    taught, before, after = result(teacher, "after"), result(student, "before"), result(student, "after")
    print(
        f"divergence from the teacher: {losses[0]:.2f} nats per token in the first step, {losses[-1]:.2f} in the last"
    )
    print(f"right of the test problems: teacher {taught:.0%}, student {before:.0%} before and {after:.0%} after")


def trained(output: str, problems: int, stage: dict[str, Any]) -> Path:
    """The folder of a run of one stage."""
    return run(
        Config(
            task="addition",
            output=output,
            adapter={"rank": 8},
            rollout={"prompts_per_step": 8, "group_size": 8, "max_tokens": 6},
            optimizer={"warmup_steps": 1},
            evaluation={"problems": problems, "every": 100},
            stage=[stage],
            quiet=True,
        )
    )


def result(folder: Path, when: str) -> float:
    return float(json.loads((folder / "summary.json").read_text())[f"test_{when}"])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
