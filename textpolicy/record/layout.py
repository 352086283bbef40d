"""What the files of a run folder are called, and how one is written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

METRICS, CONFIG, VERSIONS, SUMMARY, LOG = "metrics.jsonl", "config.json", "versions.json", "summary.json", "log.txt"
REPORT = "report.html"
TASK = "task.py"  # a copy of the file that the task is from, if it is one of the user's own
ROLLOUTS, EVALS = "rollouts", "evals"  # folders of Parquet files, docs/run_folder.md lists their columns


def rollouts_path(run: Path, step: int) -> Path:
    """The completions of training step ``step``, counted from 0 as in metrics.jsonl."""
    return run / ROLLOUTS / f"step-{step:06d}.parquet"


def evals_path(run: Path, split: str, steps: int, sampled: bool) -> Path:
    """The held-out completions of a look after so many ``steps``, greedy ones or ``sampled``."""
    return run / EVALS / f"{split}{'-sampled' if sampled else ''}-{steps:06d}.parquet"


def parquet_files(folder: Path) -> list[Path]:
    """Those of ``folder`` that are whole, in order; none if it does not exist."""
    return sorted(folder.glob("[!.]*.parquet"))


def step_of(path: Path) -> int:
    """The step in a file's name."""
    return int(path.stem.rsplit("-", 1)[1])


def drop_from(run: Path, step: int) -> None:
    """Remove what was written at training step ``step`` and after it, and what a crash left, for a run that goes on.

    A look at held-out problems counts the steps done, so the one before ``step`` stays.
    """
    later = [p for p in parquet_files(run / ROLLOUTS) if step_of(p) >= step]
    later += [p for p in parquet_files(run / EVALS) if step_of(p) > step]
    parts = [path for kind in (ROLLOUTS, EVALS) for path in (run / kind).glob(".*.part")]
    for path in [*later, *parts]:
        path.unlink()


def schema() -> pa.Schema:
    """The columns of rollouts/ and evals/: one row per completion, lists with one entry per token after the prompt."""
    import pyarrow as pa

    floats = pa.list_(pa.float32())
    return pa.schema(
        [
            ("step", pa.int32()),  # rollouts/: of training, from 0; evals/: steps done before the look
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
            ("scores", pa.map_(pa.string(), pa.float64())),  # of each of several rewards
            ("length", pa.int32()),  # sampled tokens
            ("advantage", pa.float64()),  # of the baseline, before token-level stages; null if not trained on
            ("prompt_tokens", pa.list_(pa.int32())),
            ("tokens", pa.list_(pa.int32())),  # after the prompt, replies of an environment included
            ("pieces", pa.list_(pa.string())),  # the text of each
            ("sampled", pa.list_(pa.bool_())),  # null: all of them, none is a reply
            ("logprobs", floats),  # of the distribution that sampled, exact
            ("entropy", floats),  # nats, to three digits; null when the engine cannot see it
            ("credit", floats),  # what the token was trained with
            ("planning", pa.list_(pa.bool_())),  # null when the recipe marks no planning tokens
            ("learner_logprobs", floats),  # before the update; null where the learner was not asked
        ]
    )
