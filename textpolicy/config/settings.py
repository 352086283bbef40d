"""The settings of a run: one typed tree, mirrored by TOML files and by command-line flags."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .._system.files import local_path, of_a_checkout
from ..algorithms import algorithm
from ..environment.text.template import DATE
from ..errors import UserError
from ..losses import Divergence, Estimator, RatioLevel
from ..rewards.contract import OnFailure
from ..types import Aggregation
from .adapters import Adapter, Sigma, make_adapter
from .mistakes import explain
from .mistakes import settings_of as settings_of

COLDEST = 0.01  # lowest sampling temperature in training
MONEY = ("price_prefill", "price_sample", "price_train", "max_tokens_total", "max_cost")  # of TinkerSettings
_SECRET = re.compile(r"[?&;](?=[^=&;]*(key|token|secret|passw|pwd|auth|sig|cred))[^=&;]*=", re.IGNORECASE)  # name=value
_PASSWORD_GOES_IN = {
    "base_url": "TINKER_API_KEY, or TINKER_BASE_URL",
    "uri": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
}


def _without_secret(address: str | None, info: ValidationInfo) -> str | None:
    """Return ``address``. Raises ValueError for one with a password or key, which the run's folder would keep."""
    text = address or ""
    try:
        parts = urlsplit(text if "://" in text else f"//{text}")
        name_or_key, password = parts.username, parts.password
    except ValueError:  # not an address at all; connecting to it reports that
        return address
    web = parts.scheme.lower() in ("http", "https")
    after = f"{parts.query}&{parts.fragment}" if web else parts.query
    if password or (web and (name_or_key or after != "&")) or _SECRET.search(unquote(f"{parts.path}?{after}")):
        raise ValueError(
            f"{info.field_name} has a password, key or query, which would be written to the run's folder; give the "
            "address without it, and set " + _PASSWORD_GOES_IN[str(info.field_name)]
        )
    return address


def _no_switch(value: Any) -> Any:
    """Return ``value``. Raises an error for true and false, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


TemplateArgs = dict[str, JsonValue]
_Whole = Annotated[int, BeforeValidator(_no_switch)]
_Real = Annotated[float, BeforeValidator(_no_switch)]
PositiveInt = Annotated[_Whole, Field(ge=1, le=2**31 - 1)]
NonNegativeInt = Annotated[_Whole, Field(ge=0, le=2**31 - 1)]
NonNegative = Annotated[_Real, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[_Real, Field(gt=0, allow_inf_nan=False)]
LocalPath = Annotated[Path, BeforeValidator(local_path)]
ModelName = Annotated[str, Field(min_length=1)]  # an empty path would be the folder that one is in
Address = Annotated[str | None, AfterValidator(_without_secret)]


class Positional:
    """The mark of an argument without a flag: ``Annotated[Path, Positional]``."""


class Section(BaseModel):
    """The base of all sections: frozen, and strict: no mistyped key, no number that is not finite, text in UTF-8."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str | Path) and "\0" in str(value):
            raise ValueError(f"{info.field_name} has a zero byte, which no name or path can have; remove it")
        written = json.dumps(value, ensure_ascii=False, default=str)
        if not written.isascii() and any("\ud800" <= letter <= "\udfff" for letter in written):
            raise ValueError(f"{info.field_name} has text that is not UTF-8; write it in UTF-8")
        return value


def changed(section: Section) -> list[str]:
    """Return the names of the settings in ``section`` that are not at their defaults."""
    return [name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default]


class AdapterSettings(Section):
    """The trainable parameters: an adapter on a frozen model, or with full the model itself."""

    kind: Literal["lora", "dora", "qlora", "full", "lora_xs", "tinylora"] = "lora"
    """Kind of adapter; docs/10_lora_qlora.md describes each. Settings left out below take the kind's defaults."""
    layers: NonNegativeInt | None = None
    """Adapt only the last blocks, this many; 0 adapts all."""
    modules: tuple[str, ...] | None = None
    """Adapt only these linear modules, such as q_proj,v_proj; all by default."""
    rank: PositiveInt | None = None
    """Rank of the adapter; 16 by default, 2 for tinylora."""
    alpha: Positive | None = None
    """Scale the output of a LoRA by alpha / rank; 32 by default."""
    rank_stabilised: bool | None = None
    """Scale by alpha / sqrt(rank) instead."""
    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    """qlora: bits per weight of the base, if it is not quantised already; 4 by default."""
    group_size: Literal[32, 64, 128] | None = None
    """qlora: number of weights that share a scale; 64 by default."""
    u: PositiveInt | None = None
    """tinylora: length of the trained vector; 13 by default."""
    tie: NonNegativeInt | None = None
    """tinylora: number of modules that share one vector; 0, the default, shares it among all."""
    tying: Literal["tiled", "structured"] | None = None
    """tinylora: share a vector among neighbouring modules of any name (tiled), or of the same name (structured)."""
    sigma: Sigma | None = None
    """tinylora, lora_xs: put the singular values before R (paper), their roots on both sides (peft), or after R."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        self.chosen()
        return self

    def chosen(self) -> Adapter:
        """Return the adapter; raises UserError for a setting that does not apply to its kind."""
        given = self.model_dump(exclude={"kind"}, exclude_none=True)
        return make_adapter(self.kind, given)


class KLSettings(Section):
    """The penalty for moving away from the reference, which is the model without its adapter."""

    coefficient: NonNegative = 0.0
    """Weight of the penalty; 0 turns it off, and saves scoring with the reference."""
    place: Literal["loss", "reward"] = "loss"
    """Add the penalty to the loss, or subtract it from the reward (there always k1)."""
    estimator: Estimator = "k3"
    """Estimator in the loss: k2, or k3 times the ratio; use k1 and plain k3 only to replicate published results."""
    importance_weighted: bool = True
    """In the loss: multiply the estimate by the token's ratio."""


class CorrectionSettings(Section):
    """The importance weights that correct for different log-probs in sampling and in the update."""

    level: Literal["none", "token", "sequence", "geometric"] = "none"
    """Weight each token, each sequence, or keep or drop whole sequences by their geometric mean."""
    how: Literal["truncate", "mask"] = "mask"
    """Clip weights to the range (TIS), or drop tokens with weights outside it (MIS)."""
    low: NonNegative | None = None
    """Smallest weight; no lower limit by default."""
    high: Positive = 3.0
    """Largest weight."""


class SEPASettings(Section):
    """The pooling of uncertainty over execution tokens (SEPA). Settings left out take the recipe's values."""

    steps: NonNegativeInt | None = None
    """Length of the linear ramp in steps, from the step at which the gate opens."""
    schedule: Literal["linear", "auto"] | None = None
    """Increase the pooling linearly, or as the variance of execution tokens falls."""
    delay_steps: NonNegativeInt | None = None
    """Steps before the ramp starts."""
    correct_rate_gate: Annotated[float, Field(ge=0, le=1)] | None = None
    """Start pooling after the first step with this share of correct completions."""


class AlgorithmSettings(Section):
    """The recipe that turns rewards into a gradient, and changes to it. `textpolicy algorithms NAME` describes one."""

    name: str = "grpo"
    """Recipe; `textpolicy algorithms` lists them."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Divide advantages by the standard deviation of the group or of the batch, or do not divide them."""
    aggregation: Aggregation | None = None
    """How the losses of tokens are combined into one number."""
    ratio: RatioLevel | None = None
    """Compute one ratio per token, or one per completion."""
    clip_low: NonNegative | None = None
    """Clip the ratio below 1 - clip_low; 1 or more turns the lower limit off."""
    clip_high: NonNegative | None = None
    """Clip the ratio above 1 + clip_high."""
    delta: Positive | None = None
    """Largest ratio where the advantage is negative (two-sided clipping)."""
    dual_clip: Positive | None = None
    """Largest loss where the advantage is negative, as a multiple of the advantage."""
    weight_low: NonNegative | None = None
    """CISPO: smallest weight of a token's gradient."""
    weight_high: Positive | None = None
    """CISPO, DPPO: largest weight of a token's gradient."""
    divergence: Divergence | None = None
    """DPPO: measure how far a token's probability moved by total variation or by KL."""
    divergence_low: NonNegative | None = None
    """DPPO: furthest that a token's probability may fall, as a divergence."""
    divergence_high: NonNegative | None = None
    """DPPO: furthest that a token's probability may rise, as a divergence."""
    drift: NonNegative | None = None
    """Weight of half the squared log-ratio, added to the loss of each token."""
    tau_pos: Positive | None = None
    """SAPO: sharpness of the gate where the advantage is positive."""
    tau_neg: Positive | None = None
    """SAPO: sharpness of the gate where the advantage is negative."""
    off_policy_limit: NonNegative | None = None
    """Drop tokens with negative advantage in completions whose mean log-prob fell by more than this since sampling."""
    signal: Literal["reward", "correctness"] | None = None
    """Train on the reward, or on is_correct as 0 or 1."""
    mask_truncated: bool | None = None
    """Do not train on truncated completions; they still count in their group's baseline."""
    overlong_cache: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of max_tokens over which the penalty for long completions grows to 1; 0 turns it off."""
    echo: NonNegative | None = None
    """Weight of the cross-entropy on what tools and environments say, a mean over those tokens; 0 turns it off."""
    entropy_bonus: Annotated[_Real, Field(ge=0, le=1)] | None = None
    """Weight of the mean entropy of sampled tokens, a bonus in the loss; with a target the first one."""
    entropy_target: NonNegative | None = None
    """Mean entropy in nats up to which there is a bonus, whose weight then adapts, from 0 to 1."""
    entropy_step: NonNegative | None = None
    """Change of that weight in each step, 0.005 by default."""
    resample: NonNegativeInt | None = None
    """Number of times a step replaces prompts whose completions all got the same reward."""
    uncertainty: Literal["surprisal", "entropy"] | None = None
    """Measure uncertainty by the surprisal of the sampled token, or by the exact entropy."""
    entropy_beta: NonNegative | None = None
    """Strength of weighting tokens by uncertainty (gtpo, sepa, full)."""
    hicra_alpha: NonNegative | None = None
    """Strength of amplifying planning tokens (hicra, full)."""
    alpha_1: NonNegative | None = None
    """gtpo_paper: weight of the outcome."""
    alpha_2: NonNegative | None = None
    """gtpo_paper: weight of the entropy."""
    reward_threshold: float | None = None
    """gtpo_paper: a reward above this is a success."""
    normalisation: Literal["joint", "separate"] | None = None
    """gtpo_paper: normalise successes and failures together, or separately as in the paper."""
    top_entropy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Train only on this share of tokens, those with the highest entropy."""
    grams: LocalPath | None = None
    """JSON file with a list of strategic grams; the built-in list by default."""
    kl: KLSettings = KLSettings()
    correction: CorrectionSettings = CorrectionSettings()
    sepa: SEPASettings = SEPASettings()

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        algorithm(name)
        return name


class RolloutSettings(Section):
    """The sampling of completions in training."""

    prompts_per_step: PositiveInt = 16
    """Number of distinct prompts in each step."""
    group_size: Annotated[_Whole, Field(ge=2, le=2**31 - 1)] = 8
    """Completions of each prompt, at least 2: their mean reward is the baseline."""
    max_tokens: PositiveInt = 8
    """Maximum length of a completion, in tokens."""
    temperature: Annotated[_Real, Field(gt=0, le=100)] = 1.0
    """Sampling temperature; the update scores completions at the same temperature."""
    max_turns: PositiveInt = 8
    """In tasks with tools: maximum number of the model's turns in an episode."""
    max_episode_tokens: PositiveInt | None = None
    """In tasks with tools: maximum tokens of all turns and tool results; max_turns x max_tokens by default."""
    norm_noise: NonNegative = 0.0
    """Noise on the weights of norms, new in each step, falling from this to a twentieth (QeRL uses 0.01); 0 is off."""
    curriculum: Literal["none", "pass_rate"] = "none"
    """Draw prompts in turn, or prefer those that are solved some of the time."""

    @model_validator(mode="after")
    def _can_be_scored(self) -> Self:
        if self.temperature < COLDEST:
            raise ValueError(
                f"rollout.temperature is {self.temperature:g}, at which log-probs are not finite; "
                f"set it to {COLDEST} or more"
            )
        if self.max_episode_tokens is not None and self.max_episode_tokens < self.max_tokens:
            raise ValueError(
                f"rollout.max_episode_tokens is {self.max_episode_tokens} and rollout.max_tokens {self.max_tokens}; "
                "an episode must fit at least one completion"
            )
        return self


class PromptSettings(Section):
    """The chat template that turns messages into a prompt."""

    template_args: TemplateArgs = {}
    """Further arguments of the model's chat template, such as enable_thinking = false."""
    day: date = DATE
    """Today's date, for templates that write it; it is fixed so that a run has the same prompts on every day."""


class RewardSettings(Section):
    """The calls of the task's reward; ``textpolicy.rewards.Scorer`` has the same settings."""

    time_limit: Positive | None = None
    """Time limit of one call, in seconds; no limit by default."""
    concurrency: PositiveInt = 1
    """Number of calls at a time, in threads or worker processes; async rewards overlap."""
    processes: bool = False
    """Call the reward in worker processes, killed when late and restarted when they die (textpolicy[workers])."""
    on_failure: OnFailure = "raise"
    """When a call is late, raises or returns no number: stop the run, or exclude the completion from training."""
    correct_from: float | None = None
    """Count a completion as correct from this reward on, if the reward does not report correctness itself."""


class OptimizerSettings(Section):
    """The optimiser: AdamW, with linear warm-up and linear decay of the learning rate."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate; by default 0.00002 for full, 0.001 for lora_xs, 0.005 for tinylora, otherwise 0.0003."""
    warmup_steps: NonNegativeInt = 3
    """Steps until the peak, at most those of the run; if this is not set, a shorter run reaches it in its last step."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Learning rate of the last step, as a share of the peak."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    updates_per_step: PositiveInt = 1
    """Optimiser steps on the rollouts of each step, each on its own share of the prompts."""
    max_grad_norm: Positive = 1.0
    """Scale longer gradients down to this norm."""
    max_skipped: PositiveInt = 5
    """Stop the run after this many steps in a row whose loss or gradient is not finite; such steps are skipped."""


class EvaluationSettings(Section):
    """The evaluation of the run, on problems that it does not train on."""

    every: PositiveInt = 20
    """Steps between evaluations on the validation problems, which decide which adapter is kept."""
    problems: NonNegativeInt = 0
    """Evaluate on only the first validation and test problems, this many; 0 uses all."""
    samples: NonNegativeInt = 0
    """Also sample this many completions of each validation problem, for avg@n and pass@n; 0 turns this off."""


class CheckpointSettings(Section):
    """The checkpoints from which an interrupted run resumes. The last step and a new best always get one."""

    every: NonNegativeInt = 0
    """Steps between checkpoints; 0 writes them as often as 5% of the run's time allows."""
    keep: PositiveInt = 2
    """Number of recent checkpoints to keep, besides that of the best step."""


class OnPolicySettings(Section):
    """The on-policy check: before an update, compare the log-probs of sampling with those of the learner."""

    every: NonNegativeInt = 20
    """Steps between checks, starting with the first step; 0 turns them off."""
    completions: PositiveInt = 16
    """Completions scored in one check."""
    max_gap: Positive = 0.05
    """Stop the run at this mean difference of the log-probs, in nats, unless a correction is on."""


class StageSettings(Section):
    """The stage of a run: what it does, for how many steps, and the settings that differ from the run's."""

    kind: Literal["sft", "rft", "distill", "rl"]
    """Learn from demonstrations (sft), from what is sampled and right (rft), a teacher (distill), or rewards (rl)."""
    steps: PositiveInt
    """Number of training steps."""
    data: str | None = None
    """sft: the demonstrations, FILE.jsonl, .csv or .parquet, or FILE.py:FUNCTION; by default the task's answers."""
    validation: str | None = None
    """sft: more of them, whose loss is measured at every evaluation."""
    unique: bool = True
    """rft: keep each completion of a prompt once in a step."""
    cap: PositiveInt | None = None
    """rft: keep at most this many completions of a prompt in a step; all by default."""
    teacher: ModelName = "base"
    """distill: the model without its adapter (base) or as it is (self), another model, or a run with its adapter."""
    context: Literal["none", "answer", "demonstration", "sibling"] = "none"
    """distill: what the teacher also reads: a column of the row, or another completion of the group that is right."""
    coefficient: NonNegative = 1.0
    """distill: weight of the teacher's log-probs minus the policy's."""
    discount: Annotated[_Real, Field(ge=0, le=1)] = 0.0
    """distill: count what the teacher says of later tokens, each further one by this factor less."""
    reward_weight: NonNegative = 0.0
    """distill: weight of the recipe's own advantages, from rewards, that are added."""
    beta: Annotated[_Real, Field(ge=0, le=1)] | None = None
    """distill: learn the teacher's whole distribution, by forward (0) to reverse KL (1); by default sampled tokens."""
    algorithm: AlgorithmSettings = AlgorithmSettings()
    rollout: RolloutSettings = RolloutSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    on_policy: OnPolicySettings = OnPolicySettings()

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        for kind, names in _OF_KIND.items():
            for name in names:
                if kind != self.kind and name in changed(self):
                    raise ValueError(f"stage.{name} is set in a stage of the kind {self.kind}; it belongs to {kind}")
        whole = (
            {"coefficient", "discount", "reward_weight"}.intersection(changed(self)) if self.beta is not None else ()
        )
        if whole or (self.beta is not None and self.context == "sibling"):
            raise ValueError(
                f"stage.beta is {self.beta:g}, which learns whole distributions, and {min(whole, default='context')} "
                "is of sampled tokens; leave one of them out"
            )
        if self.kind == "distill" and self.teacher == "self" and self.context == "none":
            raise ValueError(
                "stage.teacher is self and stage.context none, so that there is nothing to learn from it; set "
                "stage.context to answer, demonstration or sibling, or choose another teacher"
            )
        return self


_OF_KIND = {
    "sft": ("data", "validation"),
    "rft": ("unique", "cap"),
    "distill": ("teacher", "context", "coefficient", "discount", "reward_weight"),
}  # settings of one kind of stage
_OF_RUN = (  # settings in sections that a stage may change, which all stages share
    ("rollout", "max_tokens"),
    ("rollout", "max_turns"),
    ("rollout", "max_episode_tokens"),
    ("optimizer", "weight_decay"),
    ("optimizer", "max_grad_norm"),
    ("optimizer", "max_skipped"),
)
_OF_STAGE = ("algorithm", "rollout", "optimizer", "on_policy")  # sections that a stage may change


class MachineSettings(Section):
    """The use of this machine: changes speed and memory, not results."""

    threads: NonNegativeInt = 0
    """BLAS threads on a Linux CPU; 0 is as many as other programs leave cores free."""
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens, prompts included, in one forward and backward pass; reduced if memory is short."""
    decode_rows: PositiveInt = 128
    """Completions decoded side by side; reduced if memory is short."""
    checkpoint_every: NonNegativeInt = 0
    """Recompute the activations of every n-th block instead of keeping them; 1 saves most memory, 0 turns it off."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the update's passes for shapes that occur again; auto does so only on a GPU."""
    devices: PositiveInt = 1
    """Ranks of the run on this machine, one for each GPU; mlx.launch starts them on several machines."""
    deadline: Positive = 600.0
    """Seconds that a rank waits for another before all of them end."""
    memory_limit_gb: Positive | None = None
    """Memory limit of MLX, in GB of 10^9 bytes; by default 80% of the machine's memory, or 90% of a GPU's."""


class TinkerSettings(Section):
    """The Tinker server of engine tinker, how it differs from the hosted service, and what the run may cost."""

    base_url: Address = None
    """Address of the server; by default TINKER_BASE_URL, or the hosted service. The key is read from TINKER_API_KEY."""
    resume: str | None = None
    """Start from weights and optimiser state saved on the server: tinker://.../weights/NAME."""
    reduction: Literal["sum", "mean"] = "sum"
    """How the server reduces losses over tokens and data: sum on hosted Tinker, mean on SkyRL's JAX engine."""
    untempered: bool = False
    """Allow sampling at a temperature other than 1, although ratios are then those of the untempered policies."""
    patience: Positive = 120.0
    """Seconds without an answer after which the server counts as unreachable."""
    price_prefill: NonNegative = 0.0
    """Price per million tokens of prompts, and of sequences that are only scored."""
    price_sample: NonNegative = 0.0
    """Price per million sampled tokens."""
    price_train: NonNegative = 0.0
    """Price per million tokens trained on, prompts included."""
    max_tokens_total: PositiveInt | None = None
    """End the run before a step that could exceed this number of tokens of all kinds."""
    max_cost: Positive | None = None
    """End the run before a step that could exceed this cost, at the prices given."""

    @model_validator(mode="after")
    def _cost_is_known(self) -> Self:
        if self.max_cost is not None and not (self.price_prefill or self.price_sample or self.price_train):
            raise ValueError(
                f"max_cost is {self.max_cost:g} and no price is given; set price_prefill, price_sample and price_train"
            )
        return self


class TrackingSettings(Section):
    """The trackers that receive the metrics, besides the run's folder; docs/trackers.md."""

    to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Any of tensorboard, wandb, trackio and mlflow."""
    project: str = "textpolicy"
    """Project in wandb and trackio, experiment in MLflow."""
    name: str | None = None
    """Name of the run in the tracker; by default that of its folder."""
    offline: bool = False
    """wandb: keep everything in the run's folder, for `wandb sync`."""
    uri: Address = None
    """MLflow: tracking server or store; by default files in the run's folder."""


class Config(Section):
    """The settings that determine a training run."""

    model: ModelName = "smollm2-135m"
    """Built-in name, folder, .gguf file or hub id such as Qwen/Qwen3-0.6B."""
    task: str = "largest"
    """Task to train on: largest, reasoning_gym:chain_sum, your own FILE.py:FUNCTION; `textpolicy tasks` lists them."""
    steps: PositiveInt = 64
    """Number of training steps."""
    seed: Annotated[_Whole, Field(ge=0, lt=2**63)] = 0
    """Seed of the adapter's initial values, the order of problems and every sampled token."""
    output: LocalPath | None = None
    """Folder of the run; an interrupted run in it is resumed. By default a new folder under runs/."""
    engine: Literal["mlx", "tinker"] = "mlx"
    """Train on this machine, or on a Tinker server, which knows the model by its own name."""
    quiet: bool = False
    """Print only the final table; log.txt in the run's folder has every line."""
    algorithm: AlgorithmSettings = AlgorithmSettings()
    adapter: AdapterSettings = AdapterSettings()
    rollout: RolloutSettings = RolloutSettings()
    prompt: PromptSettings = PromptSettings()
    rewards: RewardSettings = RewardSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    on_policy: OnPolicySettings = OnPolicySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    machine: MachineSettings = MachineSettings()
    tinker: TinkerSettings = TinkerSettings()
    tracking: TrackingSettings = TrackingSettings()
    stage: tuple[StageSettings, ...] = ()
    """The stages of the run, tables [[stage]] in a TOML file; without any a run is one of rl. docs/15_stages.md."""

    @model_validator(mode="before")
    @classmethod
    def _stages_begin_with_the_runs_settings(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(stages := values.get("stage"), list | tuple) or not stages:
            return values
        plain = [s.model_dump(exclude_unset=True) if isinstance(s, BaseModel) else s for s in stages]
        given = {name: values[name] for name in _OF_STAGE if name in values}
        base = {n: s.model_dump(exclude_unset=True) if isinstance(s, BaseModel) else s for n, s in given.items()}
        merged_stages = [merged(base, stage) if isinstance(stage, dict) else stage for stage in plain]
        steps = [stage.get("steps") for stage in merged_stages if isinstance(stage, dict)]
        total = {"steps": sum(filter(None, steps))} if steps and all(type(n) is int and n > 0 for n in steps) else {}
        return {**total, **values, "stage": merged_stages}

    @property
    def stages(self) -> tuple[Config, ...]:
        """The settings of each stage, in order, as those of a run of that stage alone; of the run if it has none."""
        return tuple(
            self.model_copy(update={"steps": s.steps, "stage": (s,), **{name: getattr(s, name) for name in _OF_STAGE}})
            for s in self.stage
        ) or (self,)

    @model_validator(mode="after")
    def _stages_make_up_the_run(self) -> Self:
        if self.stage and self.steps != (total := sum(stage.steps for stage in self.stage)):
            raise ValueError(f"steps is {self.steps} and the stages have {total} in all; leave steps out")
        for n, stage in enumerate(self.stage, 1):
            for section, name in _OF_RUN:
                here, there = (getattr(getattr(settings, section), name) for settings in (self, stage))
                if here != there:
                    raise ValueError(
                        f"{section}.{name} is {there} in stage {n}; it is one for all stages, so set it for the run"
                    )
            if self.engine == "tinker" and stage.beta is not None:
                raise ValueError("stage.beta is set and engine is tinker, which gives no distributions; leave beta out")
            if self.engine == "tinker" and (len(self.stage) > 1 or stage.kind not in ("distill", "rl")):
                raise ValueError(
                    f"engine is tinker, which takes a run of one stage, distill or rl, and stage {n} is one of "
                    f"{len(self.stage)} and of {stage.kind}; leave the others out, or set engine to mlx"
                )
        return self

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        for config in self.stages:
            if config.optimizer.updates_per_step > config.rollout.prompts_per_step:
                raise ValueError(
                    f"optimizer.updates_per_step is {config.optimizer.updates_per_step} and rollout.prompts_per_step "
                    f"{config.rollout.prompts_per_step}; set the updates to at most the prompts"
                )
            if self.adapter.kind == "full" and config.algorithm.kl.coefficient:
                raise ValueError(
                    f"algorithm.kl.coefficient is {config.algorithm.kl.coefficient} and adapter.kind full, which "
                    "leaves no reference; set the coefficient to 0, or choose another kind"
                )
            if config.optimizer.updates_per_step > 1 and any(s.beta is not None for s in config.stage):
                raise ValueError(
                    f"optimizer.updates_per_step is {config.optimizer.updates_per_step} and a stage with a beta takes "
                    "one update a step; set it to 1 there"
                )
            if config.rollout.norm_noise and (self.adapter.kind == "full" or self.engine == "tinker"):
                why = "adapter.kind full, which trains the norms"
                if self.engine == "tinker":
                    why = "engine tinker, whose model is elsewhere"
                raise ValueError(f"rollout.norm_noise is {config.rollout.norm_noise:g} and {why}; leave it out")
            if self.adapter.kind == "full" and any(s.kind == "distill" and s.teacher == "base" for s in config.stage):
                raise ValueError(
                    "stage.teacher is base and adapter.kind full, which leaves no model without adapter; set the "
                    "teacher to a model, or choose another kind"
                )
        if self.engine != "tinker" and (given := changed(self.tinker)):
            raise ValueError(f"tinker.{given[0]} is set and engine is {self.engine}; set engine to tinker")
        return self


def read_config(path: Path) -> Config:
    """Read the settings in a TOML file. Raises a UserError that names the file, the key and what to do."""
    return check_config(read_values(path), str(path))


def read_values(path: Path) -> dict[str, Any]:
    """Read a TOML file, without checking its keys and values. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = f"({error.strerror}); check the path{of_a_checkout(path)}"
        raise UserError(f"cannot read the config {path} {reason}") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number with thousands of digits
        raise UserError(f"{path} is not TOML ({' '.join(str(error).split())}); fix that line") from error


def check_config(values: dict[str, Any], source: str) -> Config:
    """Return ``values`` as a Config. Raises a UserError that names their ``source`` and every mistake."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(explain(error, Config))) from error


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``changes`` merged into them, table by table."""
    both = dict(values)
    for name, value in changes.items():
        old = values.get(name)
        both[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both
