"""Your own reward and your own questions, with all that a run brings: evaluation, checkpoints, the viewer, the doctor.

    textpolicy train --task examples/16_own_task.py --rewards.correct-from 1

trains on what ``task`` below returns. Questions can come from a file as well: task_from_rows("questions.jsonl", ...).
Run as a script this trains a few steps and prints how many held-out questions got a list of five different things.
"""

import json
import sys

from textpolicy.config import Config
from textpolicy.run import run
from textpolicy.tasks import Task, task_from_rows

KINDS = (
    "fruits, animals, colours, rivers, cities, trees, birds, planets, tools, sports, metals, flowers, fish, insects, "
    "languages, instruments, drinks, vegetables, countries, mountains, shapes, games, jobs, spices, clothes, vehicles"
)


def five_things(prompt: str, completion: str, example: dict, **kwargs) -> float:
    """A fifth for each different thing between commas, up to 1; a repeated one takes a fifth away."""
    things = [thing.strip(" .\n").lower() for thing in completion.split(",")]
    named = [thing for thing in things if 0 < len(thing.split()) <= 2]
    different = len(set(named))
    return max(0.0, min(5, different) - (len(named) - different)) / 5


def task() -> Task:
    """Name five things of a kind, with commas between them."""
    rows = [{"question": f"Name some {kind}."} for kind in KINDS.split(", ")]
    return task_from_rows(rows, five_things, name="five_things", max_tokens=24)


def main(steps: int = 8) -> None:
    folder = run(
        Config(
            task=__file__,
            steps=steps,
            rewards={"correct_from": 1.0},
            rollout={"prompts_per_step": 4, "group_size": 8},
            optimizer={"learning_rate": 5e-4},
            quiet=True,
        )
    )
    found = json.loads((folder / "summary.json").read_text())
    print(f"lists of five: {found['test_before']:.0%} of held-out questions before, {found['test_after']:.0%} after")
    print(f"look at every one: textpolicy view {folder}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
