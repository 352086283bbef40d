"""The requests that clients of the Tinker API send as JSON; fields that are not listed are ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field

from ..config.flags import checked
from ..config.settings import Section
from ..errors import UserError

Place = Annotated[int, Field(ge=0, lt=2**31)]
Whole = Annotated[int, Field(ge=0, lt=2**62)]
Ttl = Annotated[int, Field(ge=1, le=10 * 366 * 86400)]
Id = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._:-]+$")]
A = TypeVar("A", bound="Asked")


class Asked(Section):
    """The base of what clients send."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class LoraConfig(Asked):
    """The adapter of a new model."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Family(Asked):
    """The family of an optimiser."""

    type: str = "adamw"


class CreateSession(Asked):
    """The beginning of a client's work."""

    tags: list[str] = Field(default_factory=list)
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class OfSession(Asked):
    """The description of a session."""

    session_id: Id


class CreateModel(Asked):
    """The wish for a model to train."""

    session_id: Id
    model_seq_id: Place
    base_model: str
    lora_config: LoraConfig | None = None
    optimizer_config: Family = Family()
    user_metadata: dict[str, Any] | None = None


class Addressed(Asked):
    """The model that is meant: one that is there, in its order, or a new one of a session."""

    model_id: Id | None = None
    seq_id: Place | None = None
    session_id: Id | None = None
    model_seq_id: Place | None = None


class LoadWeights(Addressed):
    """The wish for the weights of a checkpoint, in a new model or in one that is there."""

    base_model: str | None = None
    path: str
    optimizer: bool = False
    optimizer_config: Family | None = None
    user_metadata: dict[str, Any] | None = None


class CopyWeights(Asked):
    """The wish for a copy of a checkpoint, in a session's name or in a new one."""

    source_path: str
    session_id: Id | None = None
    model_seq_id: Place | None = None
    ttl_seconds: Ttl | None = None


class OfModel(Asked):
    """The request to a model, in its order."""

    model_id: Id
    seq_id: Place | None = None


class AdamParams(Asked):
    """The settings of a step."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(OfModel):
    """The wish for a step."""

    adam_params: AdamParams = AdamParams()
    optimizer_params: Family | None = None


class SaveWeights(OfModel):
    """The wish for a checkpoint."""

    path: str | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveForSampler(SaveWeights):
    """The wish for a sampler of the weights as they are."""

    sampling_session_seq_id: Place | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


class CreateSampler(Asked):
    """The wish for a sampler of a base model or of a checkpoint."""

    session_id: Id
    sampling_session_seq_id: Place
    base_model: str | None = None
    model_path: str | None = None


class Chunk(Asked):
    """The piece of a prompt."""

    type: str = "encoded_text"
    tokens: list[int] = Field(default_factory=list)


class Prompt(Asked):
    """The prompt."""

    chunks: list[Chunk]


class SamplingParams(Asked):
    """The settings of sampling."""

    max_tokens: Place | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Asked):
    """The wish for completions of a prompt."""

    sampling_session_id: Id | None = None
    seq_id: Whole | None = None
    base_model: str | None = None
    model_path: str | None = None
    num_samples: Annotated[int, Field(ge=1, le=65536)] = 1
    prompt: Prompt
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=1024)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=1024)] = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=1024)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool | None = None


class Retrieve(Asked):
    """The wish for the result of a request."""

    request_id: str
    allow_metadata_only: bool = False


def read_json(kind: type[A], body: bytes | Mapping[str, Any]) -> A:
    """Return the ``body`` as a ``kind``. Raises UserError."""
    if isinstance(body, bytes):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the body of the request is no JSON ({error}); send an object") from error
    if not isinstance(body, Mapping):
        raise UserError(f"the body of the request is {type(body).__name__}; send an object")
    return checked(kind, body)
