"""A stand-in for train_math: takes its flags, trains nothing, writes the files that it documents. Fails on request."""

import json
import os
import sys
from pathlib import Path

ASKED = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
FOLDER, STEPS = Path(ASKED["log-dir"]), int(ASKED["max-steps"])
GAIN = 0.2 if ASKED["algorithm"] == "full" else 0.0
RATE = 0.3 + GAIN + int(ASKED["seed"]) % 7 / 100 - abs(float(ASKED["lr"]) - 4e-5) * 1000


def write(name, rows):
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if f"{ASKED['algorithm']}{ASKED['seed']}" in os.environ.get("PRETEND_TO_FAIL", "").split():
    sys.exit(1)
write("calls.jsonl", [sys.argv[1:]])
write("metrics.jsonl", [
    {"step": s, "loss": 0.1, "correct_rate": RATE, "running_correct_rate": RATE, "num_datums": 8,
     "sampled_tokens": 100.0, "trained_tokens": 300.0, "sample_seconds": 1.0, "update_seconds": 1.0}
    for s in range(STEPS)
])  # fmt: skip
write("evals.jsonl", [
    {"kind": "eval", "split": "test", "step": s, "accuracy": RATE * s / STEPS, "problems": 10} for s in (0, STEPS)
])  # fmt: skip
write("emergence/steps.jsonl", [{"step": s, "mean_reward": RATE} for s in range(STEPS)])
write("emergence/generations.jsonl", [
    {"prompt": f"p{i}", "reward": float(i < 100 * RATE), "gram_entropy_delta": None, "metadata": {}} for i in range(100)
])  # fmt: skip
write("checkpoints.jsonl", [{"name": "final", "step": STEPS}])
write("summary.json", [{"steps": STEPS}])
