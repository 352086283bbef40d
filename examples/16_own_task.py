"""Train on your own reward and questions, with evaluation, checkpoints, the viewer and the doctor of every run.

    textpolicy train --task examples/16_own_task.py --rewards.correct-from 1

trains on the result of ``task`` below. Questions can come from a file as well: task_from_rows("questions.jsonl", ...).
As a script this trains for some minutes and prints the rewards of the first and the last steps.
"""

import json
import sys

from textpolicy.config.settings import Config
from textpolicy.run.training_run import run
from textpolicy.tasks import Task, task_from_rows

KINDS = (
    "fruits, animals, colours, rivers, cities, trees, birds, planets, tools, sports, metals, flowers, fish, insects, "
    "languages, instruments, drinks, vegetables, countries, mountains, shapes, games, jobs, spices, clothes, vehicles"
)


def five_things(prompt: str, completion: str, example: dict, **kwargs) -> float:
    """Return a fifth for each different thing of one or two words between commas, up to 1."""
    things = [thing.strip(" .\n").lower() for thing in completion.split(",")]
    return min(5, len({thing for thing in things if 0 < len(thing.split()) <= 2})) / 5


def task() -> Task:
    """The task: name five things of a kind, with commas between them."""
    rows = [{"question": f"Name some {kind}."} for kind in KINDS.split(", ")]
    return task_from_rows(rows, five_things, name="five_things", max_tokens=24)


def main(steps: int = 12) -> None:
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
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    earned = [row["reward_mean"] for row in rows if row["kind"] == "train"]
    print(f"reward: {earned[0]:.2f} in the first step, {earned[-1]:.2f} in the last")
    print(f"browse the completions: textpolicy view {folder}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
