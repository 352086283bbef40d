"""The names of the files in a run folder, and the schema of its Parquet files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

METRICS, CONFIG, VERSIONS, SUMMARY, LOG = "metrics.jsonl", "config.json", "versions.json", "summary.json", "log.txt"
REPORT = "report.html"
MATH_EVALS = "evals.jsonl"  # of train_math: evaluations of the held-out problems, which other runs have in METRICS
TASK = "task.py"  # a copy of the user's own task file, if the run used one
ROLLOUTS, EVALS = "rollouts", "evals"  # folders of Parquet files; docs/run_folder.md lists their columns


def rollouts_path(run: Path, step: int) -> Path:
    """Return the path for the completions of training step ``step``, counted from 0 as in metrics.jsonl."""
    return run / ROLLOUTS / f"step-{step:06d}.parquet"


def parquet_files(folder: Path) -> list[Path]:
    """Return the complete Parquet files of ``folder``, sorted; an empty list if the folder does not exist."""
    return sorted(folder.glob("[!.]*.parquet"))


def drop_from(run: Path, step: int) -> None:
    """Remove the files written at training step ``step`` or later, and partial files, before the run resumes.

    Evaluations are numbered by the steps done before them, so the evaluation numbered ``step`` stays.
    """
    stale = [path for kind in (ROLLOUTS, EVALS) for path in (run / kind).glob(".*.part")]
    for kind, first in ((ROLLOUTS, step), (EVALS, step + 1)):
        numbered = ((re.fullmatch(r".*-(\d+)", path.stem), path) for path in parquet_files(run / kind))
        stale += [path for number, path in numbered if number is not None and int(number[1]) >= first]
    for path in stale:
        path.unlink(missing_ok=True)  # macOS removes the ._ half of a file with the file


def schema() -> pa.Schema:
    """Return the columns of rollouts/ and evals/: one row per completion, one list entry per token after the prompt."""
    import pyarrow as pa

    floats = pa.list_(pa.float32())
    return pa.schema(
        [
            ("step", pa.int32()),  # rollouts/: training step, from 0; evals/: steps done before the evaluation
            ("split", pa.string()),  # train, validation or test
            ("group", pa.int32()),  # completions of one prompt in one step
            ("sample", pa.int32()),  # place in its group
            ("prompt_index", pa.int32()),  # in the split's problems
            ("temperature", pa.float32()),
            ("prompt", pa.string()),
            ("text", pa.string()),
            ("finish_reason", pa.string()),  # stop or length
            ("reward", pa.float64()),  # null where it could not be scored
            ("is_correct", pa.bool_()),  # null when the reward does not say
            ("scores", pa.map_(pa.string(), pa.float64())),  # each reward's score, where there are several
            ("length", pa.int32()),  # sampled tokens
            ("advantage", pa.float64()),  # from the baseline, before token-level stages; null if not trained on
            ("prompt_tokens", pa.list_(pa.int32())),
            ("tokens", pa.list_(pa.int32())),  # after the prompt, replies of an environment included
            ("pieces", pa.list_(pa.string())),  # the text of each token
            ("sampled", pa.list_(pa.bool_())),  # null: every token was sampled, none is a reply
            ("logprobs", floats),  # under the distribution that was sampled from, exact
            ("entropy", floats),  # nats, to three digits; null when the engine does not report it
            ("credit", floats),  # the advantage each token was trained with
            ("planning", pa.list_(pa.bool_())),  # null when the recipe marks no planning tokens
            ("learner_logprobs", floats),  # before the update; null where the learner was not evaluated
        ]
    )
