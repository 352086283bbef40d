"""Learn from a teacher token by token: here the model itself, which also reads the answer.

Every sampled token has a signal, q - l: how much likelier it is to the teacher. It is there also where all completions
of a prompt are wrong, and rewards say nothing. ``teacher`` may be another model of the same tokenizer, or a run.
"""

import json
import sys

from textpolicy.config.settings import Config
from textpolicy.run.training_run import run


def main(steps: int = 12, problems: int = 40) -> None:
    folder = run(
        Config(
            task="addition",
            adapter={"rank": 8},
            algorithm={"name": "bnpo"},
            rollout={"prompts_per_step": 8, "group_size": 8, "max_tokens": 6},
            optimizer={"warmup_steps": 1},
            evaluation={"problems": problems, "every": 100},
            stage=[{"kind": "distill", "steps": steps, "teacher": "self", "context": "answer"}],
            quiet=True,
        )
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kl = [row["teacher_kl"] for row in rows if row["kind"] == "train"]
    summary = json.loads((folder / "summary.json").read_text())
    print(f"KL to the teacher: {kl[0]:.2f} nats per token in the first step, {kl[-1]:.2f} in the last")
    print(
        f"before training {summary['test_before']:.0%} of the test problems right, after it {summary['test_after']:.0%}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
