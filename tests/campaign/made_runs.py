"""Finished run folders made by hand, as `textpolicy train` leaves them."""

import json


def write_run(folder, accuracies, solved=None, test=None, tokens=100):
    """Write evaluations on ten validation problems after 0, 1, ... steps, and one on the test problems at the end."""
    folder.mkdir(parents=True)
    rows = [evaluation("test", 0, 0.1, None)]
    for step, accuracy in enumerate(accuracies):
        last = step == len(accuracies) - 1
        rows.append(evaluation("validation", step, accuracy, solved if last else None))
        if not last:
            rows.append({"kind": "train", "step": step, "sampled_tokens": tokens, "trained_tokens": 3 * tokens,
                         "sample_seconds": 1.0, "update_seconds": 2.0})  # fmt: skip
    rows.append(evaluation("test", len(accuracies) - 1, accuracies[-1] if test is None else test, solved))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text("{}")


def evaluation(split, step, accuracy, solved):
    row = {"kind": "eval", "step": step, "split": split, "accuracy": accuracy, "problems": 10}
    return row if solved is None else {**row, "solved": solved}
