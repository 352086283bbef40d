"""Teach first, then reinforce: demonstrations and then rewards, as two stages of one run with one adapter.

As a script this trains for some minutes and prints what each stage reached. The same in a TOML file:

    task = "addition"
    [[stage]]
    kind = "sft"        # the task's own answers; data = "rows.jsonl" learns from yours
    steps = 12
    [[stage]]
    kind = "rl"
    steps = 24
"""

import json
import sys

from textpolicy.config.settings import Config
from textpolicy.run.training_run import run


def main(sft: int = 12, rl: int = 24, problems: int = 40) -> None:
    folder = run(
        Config(
            task="addition",
            adapter={"rank": 8},
            rollout={"prompts_per_step": 8, "group_size": 8, "max_tokens": 6},
            optimizer={"warmup_steps": 1},
            evaluation={"problems": problems, "samples": 4, "every": 100},
            stage=[{"kind": "sft", "steps": sft}, {"kind": "rl", "steps": rl}],
            quiet=True,
        )
    )
    summary = json.loads((folder / "summary.json").read_text())
    print(
        f"before training {summary['test_before']:.0%} of the test problems right, after it {summary['test_after']:.0%}"
    )
    for stage in summary["stages"]:
        right, passed = stage["accuracy"], stage["pass@4"]
        print(f"after {stage['stage']}: {right:.0%} of the validation problems right, pass@4 {passed:.0%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
