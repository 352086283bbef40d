"""A run's settings: one typed tree, mirrored by TOML files and by command-line flags."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..algorithms import algorithm
from ..errors import UserError
from ..losses import Estimator, RatioLevel
from ..rewards.contract import OnFailure
from ..types import Aggregation
from .adapters import Adapter, Sigma, make_adapter

COLDEST = 0.01  # temperature of sampling, in training
_UNTRAINABLE = ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_LONGEST = 60  # characters of a wrong value that are shown
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**31 - 1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Frozen, and strict about names: a key that does not exist is an error, not a typo that trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def changed(section: Section) -> list[str]:
    """The settings of ``section`` that are not at their defaults."""
    return [name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default]


class AdapterSettings(Section):
    """What is trained; the model's own weights stay as they are, but for full. The kind's own if not given."""

    kind: Literal["lora", "dora", "qlora", "full", "lora_xs", "tinylora"] = "lora"
    """docs/10_lora_qlora.md describes them."""
    layers: NonNegativeInt | None = None
    """Adapt the last so many blocks; 0 adapts all."""
    modules: tuple[str, ...] | None = None
    """Adapt only these linear modules, such as q_proj,v_proj; all if not given."""
    rank: PositiveInt | None = None
    """Width: 16, or 2 for tinylora."""
    alpha: Positive | None = None
    """A LoRA's output is scaled by alpha / rank; 32."""
    rank_stabilised: bool | None = None
    """Scale by alpha / sqrt(rank) instead."""
    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    """qlora: of the base, if it is not quantised already; 4."""
    group_size: Literal[32, 64, 128] | None = None
    """qlora: weights that share a scale; 64."""
    u: PositiveInt | None = None
    """tinylora: length of the trained vector; 13."""
    tie: NonNegativeInt | None = None
    """tinylora: modules that share one vector; 0, the default, is all."""
    tying: Literal["tiled", "structured"] | None = None
    """tinylora: share among neighbours, or among modules of one kind."""
    sigma: Sigma | None = None
    """tinylora, lora_xs: the singular values stand before R (paper), as roots on both sides (peft), or behind it."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        self.chosen()
        return self

    def chosen(self) -> Adapter:
        """The adapter; raises UserError for a setting that its kind has no use for."""
        given = self.model_dump(exclude={"kind"}, exclude_none=True)
        return make_adapter(self.kind, given)


class KLSettings(Section):
    """A penalty for leaving the reference: the same weights with their adapters off."""

    coefficient: NonNegative = 0.0
    """Weight of the penalty, in the loss or the reward; 0 is none, and saves scoring the reference."""
    place: Literal["loss", "reward"] = "loss"
    """In the loss, or subtracted from the reward (always k1)."""
    estimator: Estimator = "k3"
    """In the loss: k2, or k3 times the ratio; k1 and plain k3 are for replication. The reward's is always k1."""
    importance_weighted: bool = True
    """In the loss: multiply the estimate by the token ratio."""


class CorrectionSettings(Section):
    """Weights for the mismatch between the log-probs of decoding and of the update."""

    level: Literal["none", "token", "sequence", "geometric"] = "none"
    """One weight per token, per sequence, or whole sequences kept or dropped by their mean."""
    how: Literal["truncate", "mask"] = "mask"
    """Cap weights outside the range (TIS), or drop their tokens (MIS)."""
    low: NonNegative | None = None
    """Smallest weight; none if not given."""
    high: Positive = 3.0
    """Largest weight."""


class SEPASettings(Section):
    """How SEPA pools the uncertainty of execution tokens, in the recipes that do; the recipe's own if not given."""

    steps: NonNegativeInt | None = None
    """Steps of the linear ramp, from the step at which the gate opens."""
    schedule: Literal["linear", "auto"] | None = None
    """Linear, or as the variance of execution tokens falls."""
    delay_steps: NonNegativeInt | None = None
    """Steps before the ramp."""
    correct_rate_gate: Annotated[float, Field(ge=0, le=1)] | None = None
    """Nothing is pooled before a step has had this share of correct completions."""


class AlgorithmSettings(Section):
    """How rewards become a gradient: a recipe, and what to change in it. `textpolicy algorithms NAME` shows one."""

    name: str = "grpo"
    """The recipe; `textpolicy algorithms` lists them."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Divide advantages by the standard deviation of the group, of the batch, or not."""
    aggregation: Aggregation | None = None
    """How token losses become one number."""
    ratio: RatioLevel | None = None
    """One ratio per token, or per completion."""
    clip_low: NonNegative | None = None
    """Lower clip distance of the ratio from 1; 1 or more is no lower bound."""
    clip_high: NonNegative | None = None
    """Upper clip distance of the ratio from 1."""
    delta: Positive | None = None
    """Cap on the ratio where the advantage is negative (two-sided clipping)."""
    dual_clip: Positive | None = None
    """Cap on the loss, in advantages, where the advantage is negative."""
    weight_low: NonNegative | None = None
    """CISPO: smallest weight of a token's gradient."""
    weight_high: Positive | None = None
    """CISPO: largest weight of a token's gradient."""
    tau_pos: Positive | None = None
    """SAPO: sharpness of the gate where the advantage is positive."""
    tau_neg: Positive | None = None
    """SAPO: sharpness of the gate where it is negative."""
    off_policy_limit: NonNegative | None = None
    """Drop failures whose mean log-prob has fallen by more than this since they were sampled."""
    signal: Literal["reward", "correctness"] | None = None
    """Learn from the reward, or from is_correct as 0 or 1."""
    mask_truncated: bool | None = None
    """Truncated completions count in their group and teach nothing."""
    overlong_cache: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of max_tokens over which a penalty for long completions grows to 1; 0 is off."""
    resample: NonNegativeInt | None = None
    """Times a step draws more prompts in place of those whose completions all got one reward."""
    uncertainty: Literal["surprisal", "entropy"] | None = None
    """What weights and pooling read: surprisal of the sampled token, or the exact entropy."""
    entropy_beta: NonNegative | None = None
    """Strength of the weights by uncertainty (gtpo, sepa, full)."""
    hicra_alpha: NonNegative | None = None
    """Strength of the planning tokens (hicra, full)."""
    alpha_1: NonNegative | None = None
    """gtpo_paper: weight of the outcome."""
    alpha_2: NonNegative | None = None
    """gtpo_paper: weight of the entropy."""
    reward_threshold: float | None = None
    """gtpo_paper: a reward above it is a success."""
    normalisation: Literal["joint", "separate"] | None = None
    """gtpo_paper: normalise successes and failures together, or apart as in the paper."""
    top_entropy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learn only from this share of tokens, those of the highest entropy."""
    grams: Path | None = None
    """JSON list of strategic grams; the built-in list if not given."""
    kl: KLSettings = KLSettings()
    correction: CorrectionSettings = CorrectionSettings()
    sepa: SEPASettings = SEPASettings()

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        algorithm(name)
        return name


class RolloutSettings(Section):
    """How completions are sampled in training."""

    prompts_per_step: PositiveInt = 16
    """Distinct prompts in each step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt; their mean reward is the baseline, so at least 2."""
    max_tokens: PositiveInt = 8
    """Longest completion, in tokens."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Of sampling; the update scores under the same one."""
    max_turns: PositiveInt = 8
    """In tasks with tools: turns of the model in an episode."""
    max_episode_tokens: PositiveInt | None = None
    """In tasks with tools: tokens of all turns and results together; max_turns x max_tokens if not given."""
    curriculum: Literal["none", "pass_rate"] = "none"
    """Draw every prompt in its turn, or more often those that are solved now and then."""

    @model_validator(mode="after")
    def _can_be_scored(self) -> Self:
        if self.temperature < COLDEST:
            raise ValueError(
                f"rollout.temperature is {self.temperature:g}, under which log-probs are not finite; "
                f"set it to {COLDEST} or more"
            )
        if self.max_episode_tokens is not None and self.max_episode_tokens < self.max_tokens:
            raise ValueError(
                f"rollout.max_episode_tokens is {self.max_episode_tokens} and rollout.max_tokens {self.max_tokens}; "
                "set an episode to at least one completion"
            )
        return self


class RewardSettings(Section):
    """How the task's reward is called: as ``textpolicy.rewards.Scorer`` does with the same settings."""

    time_limit: Positive | None = None
    """Seconds that one call may take; without it a call may take for ever."""
    concurrency: PositiveInt = 1
    """Calls at a time, in threads or worker processes; async rewards overlap."""
    processes: bool = False
    """Call it in worker processes, which are killed when late and replaced when they die (textpolicy[workers])."""
    on_failure: OnFailure = "raise"
    """A call that is late, raises or gives no number stops the run, or makes its completion unscorable."""
    correct_from: float | None = None
    """A completion with this reward or more counts as correct, where the reward itself does not say which are."""


class OptimizerSettings(Section):
    """AdamW, with a linear warm-up and a linear decay of its learning rate."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate; if not given 0.0003, but for full 0.00002, lora_xs 0.001, tinylora 0.005."""
    warmup_steps: NonNegativeInt = 3
    """Steps until the peak; a shorter run climbs to its end."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Learning rate of the last step, as a share of the peak."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    updates_per_step: PositiveInt = 1
    """Optimiser steps on each step's rollouts, each on its own share of the prompts."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are scaled down to this norm."""
    max_skipped: PositiveInt = 5
    """Steps in a row whose loss or gradient is not finite, each of them skipped, that stop the run."""


class EvaluationSettings(Section):
    """How the run is judged; always on problems it does not train on."""

    every: PositiveInt = 20
    """Steps between looks at the validation problems, which choose the adapter that is kept."""
    problems: NonNegativeInt = 0
    """Judge on the first so many validation and test problems; 0 for all."""
    samples: NonNegativeInt = 0
    """Also sample so many completions of each validation problem, as in training, for avg@n and pass@n; 0 for none."""


class CheckpointSettings(Section):
    """What a run that is cut short goes on from; the last step and a new best always get a checkpoint."""

    every: NonNegativeInt = 0
    """Steps between checkpoints; 0 is as often as they cost a twentieth of the time."""
    keep: PositiveInt = 2
    """The last so many stay, and that of the best step."""


class OnPolicySettings(Section):
    """Whether the learner sees the distribution that was sampled, measured before an update."""

    every: NonNegativeInt = 20
    """Steps between measurements, the first step included; 0 is never."""
    completions: PositiveInt = 16
    """Completions scored in one."""
    max_gap: Positive = 0.05
    """Mean difference of the log-probs, in nats, that stops the run, unless a correction is on."""


class MachineSettings(Section):
    """What it may use of this machine; changes speed and memory, not results."""

    threads: NonNegativeInt = 0
    """BLAS threads on a Linux CPU; 0 leaves it to OpenBLAS. On a busy machine 1 is faster."""
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens, prompts included, in one forward and backward pass; lowered where memory is short."""
    decode_rows: PositiveInt = 128
    """Completions decoded side by side; lowered where memory is short."""
    checkpoint_every: NonNegativeInt = 0
    """Compute the activations of every so many-th block again instead of keeping them; 1 saves most, 0 is off."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the update's passes for shapes that come again; auto does so on a GPU only."""
    memory_limit_gb: Positive | None = None
    """What MLX may take, in GB of 10^9 bytes; 80% of the machine's memory, or 90% of a GPU's, if not given."""


MONEY = ("price_prefill", "price_sample", "price_train", "max_tokens_total", "max_cost")  # of TinkerSettings


def _without_password(address: str | None, instead: str) -> str | None:
    """Raises ValueError for an address with a password, which the run's folder would keep."""
    try:
        kept = urlsplit(address or "").password
    except ValueError:  # no address at all; whoever connects says so
        return address
    if kept:
        raise ValueError(f"an address with a password would stand in the run's folder; leave it out and set {instead}")
    return address


class TinkerSettings(Section):
    """With engine tinker: which server, and how it differs from the hosted service."""

    base_url: str | None = None
    """Address of the server; TINKER_BASE_URL, or else the hosted service, if not given. The key is TINKER_API_KEY's."""
    resume: str | None = None
    """Begin from weights and optimiser kept there: tinker://.../weights/NAME."""
    reduction: Literal["sum", "mean"] = "sum"
    """What the server's losses do over tokens and data: sum on hosted Tinker, mean on SkyRL's JAX engine."""
    untempered: bool = False
    """Allow another temperature than 1 in sampling, though ratios are then those of the untempered policies."""
    patience: Positive = 120.0
    """Seconds without an answer after which the server counts as gone."""
    price_prefill: NonNegative = 0.0
    """Per million tokens of prompts, and of sequences that are only scored."""
    price_sample: NonNegative = 0.0
    """Per million sampled tokens."""
    price_train: NonNegative = 0.0
    """Per million tokens that are learned from, prompts included."""
    max_tokens_total: PositiveInt | None = None
    """End in order before a step that could pass so many tokens of all kinds."""
    max_cost: Positive | None = None
    """End in order before a step that could pass this cost, at the prices given."""

    @model_validator(mode="after")
    def _cost_is_known(self) -> Self:
        if self.max_cost is not None and not (self.price_prefill or self.price_sample or self.price_train):
            raise ValueError(f"max_cost is {self.max_cost:g} and no price is given; say what a million tokens cost")
        return self

    @field_validator("base_url")
    @classmethod
    def _keeps_no_secret(cls, address: str | None) -> str | None:
        return _without_password(address, "TINKER_API_KEY, or TINKER_BASE_URL")


class TrackingSettings(Section):
    """Where figures go besides the run's folder; docs/trackers.md."""

    to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Any of tensorboard, wandb, trackio and mlflow."""
    project: str = "textpolicy"
    """Project of wandb and trackio, experiment of MLflow."""
    name: str | None = None
    """The run's name there; that of its folder if not given."""
    offline: bool = False
    """wandb: keep everything in the run's folder, for `wandb sync`."""
    uri: str | None = None
    """MLflow: a tracking server or store; files in the run's folder if not given."""

    @field_validator("uri")
    @classmethod
    def _keeps_no_secret(cls, address: str | None) -> str | None:
        return _without_password(address, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")


class Config(Section):
    """Everything that determines a training run."""

    model: str = "smollm2-135m"
    """Built-in name, folder, .gguf file or hub id such as Qwen/Qwen3-0.6B."""
    task: str = "largest"
    """What to learn: largest, reasoning_gym:chain_sum, your own FILE.py:FUNCTION; `textpolicy tasks` lists them."""
    steps: PositiveInt = 64
    """Training steps."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes the adapter's start, the order of problems and every sampled token."""
    output: Path | None = None
    """Folder of the run; one that was cut short goes on. If not given, a new one under runs/."""
    engine: Literal["mlx", "tinker"] = "mlx"
    """On this machine, or on a Tinker server, which trains a model by its name there."""
    quiet: bool = False
    """Print the closing table alone; log.txt in the run's folder has every line."""
    algorithm: AlgorithmSettings = AlgorithmSettings()
    adapter: AdapterSettings = AdapterSettings()
    rollout: RolloutSettings = RolloutSettings()
    rewards: RewardSettings = RewardSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    on_policy: OnPolicySettings = OnPolicySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    machine: MachineSettings = MachineSettings()
    tinker: TinkerSettings = TinkerSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _updates_fit(self) -> Self:
        if self.optimizer.updates_per_step > self.rollout.prompts_per_step:
            raise ValueError(
                f"optimizer.updates_per_step is {self.optimizer.updates_per_step} and rollout.prompts_per_step "
                f"{self.rollout.prompts_per_step}; set the updates to at most the prompts"
            )
        return self

    @model_validator(mode="after")
    def _reference_exists(self) -> Self:
        if self.adapter.kind == "full" and self.algorithm.kl.coefficient:
            raise ValueError(
                f"algorithm.kl.coefficient is {self.algorithm.kl.coefficient} and adapter.kind full, which leaves no "
                "reference; set the coefficient to 0, or choose another kind"
            )
        return self

    @model_validator(mode="after")
    def _tinker_is_meant(self) -> Self:
        if self.engine != "tinker" and (given := changed(self.tinker)):
            raise ValueError(f"tinker.{given[0]} is set and engine is {self.engine}; set engine to tinker")
        return self


def read_config(path: Path) -> Config:
    """The settings in a TOML file, or a ``UserError`` that names the file, the key and the remedy."""
    return check_config(read_values(path), str(path))


def read_values(path: Path) -> dict[str, Any]:
    """What a TOML file holds, unchecked."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path} ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number with thousands of digits
        raise UserError(f"{path} is not TOML ({' '.join(str(error).split())}); mend that line") from error


def check_config(values: dict[str, Any], source: str) -> Config:
    """``values`` as a Config; every mistake is named in one sentence."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(explain(error, Config))) from error


def explain(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One clause per mistake in a ``kind``: the key, its value, and what it may be."""
    return [_explain_one(e, kind) for e in error.errors()]


def _explain_one(error: Any, kind: type[BaseModel]) -> str:
    path = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        if why := untrainable(path[-1]):
            return f"there is no setting {'.'.join(path)!r}; {why}"
        known = _fields_at(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        return f"there is no setting {'.'.join(path)!r}; {hint}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{'.'.join(path)} is missing; give it"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{'.'.join(path)} is {_shown(error['input'])}; {message}"


def untrainable(name: str) -> str:
    """Why a run has no setting of this name, if it is one of sampling that training refuses; else ""."""
    if name not in _UNTRAINABLE:
        return ""
    return (
        "training samples from the whole distribution, as the update scores; leave it out, or set rollout.temperature"
    )


def _shown(value: Any) -> str:
    """On one line, and not longer than a line."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _fields_at(section: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = section.model_fields[part].annotation
        section = annotation if isinstance(annotation, type) else get_args(annotation)[0]
    return list(section.model_fields)
