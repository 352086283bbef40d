"""The words that make one run of ``textpolicy.tinker.train_math``, and how to tell that it is finished."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...analysis.sepa.emergence_runs import read_rows
from ...config.settings import NonNegative, Positive, PositiveInt, Section
from ..jobs import Job

MathAlgorithm = Literal["grpo", "full"]
MODULE = "textpolicy.tinker.train_math"


class MathSettings(Section):
    """What all runs of a campaign on a Tinker server share."""

    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    """A model that the server offers."""
    base_url: str | None = None
    """The server's address; the hosted service if not given."""
    lora_rank: PositiveInt = 64
    """Width of the LoRA."""
    batch_size: PositiveInt = 4
    """Distinct problems in each step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions of each problem."""
    max_tokens: PositiveInt = 2048
    """Longest completion, in tokens."""
    temperature: Positive = 0.7
    """Of sampling."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_examples: PositiveInt | None = None
    """Train on the first so many problems."""
    save_every: Annotated[int, Field(ge=0)] = 20
    """Steps between checkpoints on the server."""
    gtpo_beta: NonNegative = 0.1
    """GTPO: strength of the weights by surprisal."""
    hicra_alpha: NonNegative = 0.2
    """HICRA: strength of the planning tokens."""
    sepa_steps: Annotated[int, Field(ge=0)] = 100
    """SEPA: steps of the ramp."""
    sepa_schedule: Literal["linear", "auto"] = "linear"
    """SEPA: linear, or as the variance of execution tokens falls."""
    sepa_delay_steps: Annotated[int, Field(ge=0)] = 10
    """SEPA: steps before the ramp."""
    sepa_correct_rate_gate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """SEPA: nothing is pooled before a step has had this share of correct completions."""
    eval_every: PositiveInt = 20
    """Steps between looks at held-out problems."""
    eval_problems: Annotated[int, Field(ge=0)] = 100
    """Judge on the first so many held-out problems; 0 for all."""
    task: str = "math"
    """What to learn; `textpolicy tasks` lists them."""
    data: Path | None = None
    """Problems of your own in place of the task: .jsonl, .csv or .parquet."""
    reduction: Literal["sum", "mean"] = "sum"
    """How the server's losses reduce: sum on hosted Tinker, mean on SkyRL's JAX engine."""


def math_job(
    shared: MathSettings, arm: str, algorithm: MathAlgorithm, lr: float, seed: int, steps: int, folder: Path
) -> Job:
    """One run, which goes on from its last checkpoint where it was killed."""
    values = {**shared.model_dump(include=set(MathSettings.model_fields)), "algorithm": algorithm, "lr": lr}
    values |= {"seed": seed, "max_steps": steps, "log_dir": folder}
    words = (MODULE, *math_flags(values))
    return Job(arm, seed, folder, words, partial(math_finished, steps=steps), resume=("--resume",))


def math_flags(values: dict[str, Any]) -> list[str]:
    """Settings as flags; one that is None is left out."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def math_finished(folder: Path, steps: int) -> bool:
    """Whether the run kept its final weights after all its steps."""
    kept = read_rows(folder / "checkpoints.jsonl")
    looked = read_rows(folder / "evals.jsonl")
    return bool(kept and looked and kept[-1]["step"] == looked[-1]["step"] == steps)
