"""From a run's settings to its parts: engine, memory, environments, schedule, sampling, and the folder it writes to."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .._system.files import fill_whole, write_whole
from ..algorithms import Algorithm
from ..config.recipe import configure
from ..config.settings import Config
from ..engine import ResumableEngine, Sampling
from ..environment.multi_turn import ToolEnv
from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError
from ..loop.curriculum import Curriculum, PassRateCurriculum
from ..loop.train import Schedule
from ..record import layout
from ..rewards.scoring import Scorer
from ..tasks import Problem, Task, load_task
from ..tasks.own import short_name, task_file
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from ..mlx.engine import MLXEngine
    from ..mlx.memory import Plan
    from ..tinker.spending import Budget

_COMPILE: dict[str, bool | Literal["auto"]] = {"auto": "auto", "on": True, "off": False}


def build_engine(config: Config, recipe: Algorithm | None = None) -> tuple[Any, Any]:
    """The engine with a fresh adapter, and the tokenizer. ``recipe`` is what it must be able to learn from."""
    if config.engine == "tinker":
        from ..tinker.build import build

        return build(config, recipe or configure(config))
    from ..mlx.adapters.merging import attach
    from ..mlx.blas import set_blas_threads  # the first import of mlx, and what it costs, is here
    from ..mlx.engine import MLXEngine
    from ..mlx.models import load_model

    if config.machine.threads:
        set_blas_threads(config.machine.threads)
    refuse_beyond_context(config, config.rollout.max_tokens, "a completion")
    adapter = config.adapter.chosen()
    model, tokenizer = load_model(config.model, dequantize=adapter.dequantize)
    attach(model, adapter, config.seed)
    engine = MLXEngine(
        model,
        stop=tokenizer.eos_token_ids,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        micro_batch_tokens=config.machine.micro_batch_tokens,
        decode_rows=config.machine.decode_rows,
        checkpoint_every=config.machine.checkpoint_every,
        compile=_COMPILE[config.machine.compile],
    )
    return engine, tokenizer


def fit_memory(engine: MLXEngine, splits: dict[str, TextGenerationEnv], config: Config) -> Plan:
    """Give ``engine`` sizes whose predicted peak fits into memory; raises UserError where none does."""
    from ..mlx.memory import Workload, preflight

    longest = {name: max(len(env.prompt_ids(i)) for i in range(len(env))) for name, env in splits.items()}
    rollout = config.rollout
    said = splits["train"].episode_tokens
    refuse_beyond_context(config, max(longest.values()) + said, "the longest prompt with what may follow it")
    training = Workload(rollout.prompts_per_step, rollout.group_size, longest["train"], said)
    judged = [Workload(len(splits[name]), 1, longest[name], said) for name in ("validation", "test")]
    return preflight(engine, training, judged, _memory_limit(config), copies=1)  # the best so far


def spending(
    config: Config, recipe: Algorithm, task: Task, engine: Any, splits: dict[str, TextGenerationEnv]
) -> Budget | None:
    """What a run on a Tinker server may spend; None on this machine, where tokens cost nothing."""
    if config.engine != "tinker":
        return None
    from ..tinker.spending import budget

    return budget(config, recipe, task, engine, splits)


def price(config: Config, expected_tokens: int | None = None) -> Sequence[str]:
    """What a run on a Tinker server may cost, line by line, without a server. Raises UserError as the run would."""
    from ..tinker.build import refuse_unhonoured
    from ..tinker.spending import quote_run

    task = load_task(config.task)
    config = sized(config, task)
    recipe = configure(config)
    refuse_unhonoured(config, recipe)
    return quote_run(config, recipe, task, expected_tokens)


def refit_memory(engine: Any, splits: dict[str, TextGenerationEnv], config: Config, checkpoint: Checkpoint) -> None:
    """For a run that goes on: the sizes it had, or, where the settings of the machine changed, those that fit now."""
    if config.engine != "mlx":
        return
    if checkpoint.state["config"]["machine"] == config.machine.model_dump():
        bound_memory(config)
    else:
        fit_memory(engine, splits, config)


def refuse_beyond_context(config: Config, tokens: int, what: str) -> None:
    """Raise UserError for ``tokens`` that the model was not made for, as far as its config says."""
    from ..mlx.models import context_length

    context = context_length(config.model)
    if context is not None and tokens > context:
        raise UserError(
            f"{what} has {tokens} tokens and the context of {config.model} {context}; lower rollout.max_tokens "
            "(and rollout.max_turns or rollout.max_episode_tokens in a task with tools), or shorten the prompts"
        )


def bound_memory(config: Config) -> None:
    """Set MLX's limits; a run that goes on has its sizes."""
    from ..mlx.memory import limit_memory

    limit_memory(_memory_limit(config))


def _memory_limit(config: Config) -> float | None:
    """In bytes, if the settings say one."""
    limit = config.machine.memory_limit_gb
    return None if limit is None else limit * 1e9


def environment(task: Task, problems: Sequence[Problem], tokenizer: Any, config: Config) -> TextGenerationEnv:
    """The task's prompts, reward and tools over one split."""
    prompts, examples = [task.prompt(p.question) for p in problems], [p.example for p in problems]
    rollout = config.rollout
    if not task.tools:
        return TextGenerationEnv(prompts, task.reward, rollout.max_tokens, tokenizer=tokenizer, examples=examples)
    return ToolEnv(
        prompts,
        task.tools,
        task.reward,
        rollout.max_tokens,
        tokenizer=tokenizer,
        examples=examples,
        max_turns=rollout.max_turns,
        max_episode_tokens=rollout.max_episode_tokens or rollout.max_turns * rollout.max_tokens,
    )


def scored(task: Task, config: Config) -> Task:
    """``task`` with its reward called as the run says, by one Scorer for all splits."""
    return replace(task, reward=Scorer(task.reward, **config.rewards.model_dump()))


def sized(config: Config, task: Task) -> Config:
    """``config`` with the completions as long as the task's, if nobody said how long."""
    if task.max_tokens is None or "max_tokens" in config.rollout.model_fields_set:
        return config
    rollout = config.rollout.model_copy(update={"max_tokens": task.max_tokens})
    return config.model_copy(update={"rollout": rollout})


def course(config: Config, env: TextGenerationEnv) -> Curriculum | None:
    """What draws the prompts, if not every one in its turn."""
    return PassRateCurriculum(len(env), seed=config.seed) if config.rollout.curriculum == "pass_rate" else None


def schedule(config: Config) -> Schedule:
    o = config.optimizer
    peak = o.learning_rate or config.adapter.chosen().learning_rate
    return Schedule(peak, config.steps, min(o.warmup_steps, config.steps), o.final_fraction)


def training_sampling(config: Config) -> Sampling:
    return Sampling(config.rollout.max_tokens, config.rollout.temperature, seed=config.seed)


def greedy(config: Config) -> Sampling:
    return Sampling(config.rollout.max_tokens, temperature=0.0)


def claim_folder(config: Config) -> Path:
    """Make the run's folder: the one asked for, or the first free name under runs/."""
    if config.output is not None:
        return _make_folder(config.output)
    name, n = (
        re.sub(r"[^\w+.-]", "-", f"{short_name(config.task)}-{config.algorithm.name}-seed{config.seed}").lstrip("."),
        1,
    )
    while True:
        path = Path("runs") / (name if n == 1 else f"{name}-{n}")
        if not path.exists():
            return _make_folder(path)
        n += 1


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {path} ({error.strerror}); choose another") from error
    return path


def write_setup(folder: Path, config: Config, engine: ResumableEngine) -> None:
    """The resolved settings, the versions that ran them, and the file of a task of one's own. Raises OSError."""
    if (own := task_file(config.task)) is not None:
        code = own[0].read_bytes()
        fill_whole(folder / layout.TASK, lambda file: file.write(code))
    write_whole(folder / layout.VERSIONS, json.dumps(versions(engine, config.task), indent=2) + "\n")
    write_config(folder, config)


def write_config(folder: Path, config: Config) -> None:
    """The resolved settings. Raises OSError."""
    write_whole(folder / layout.CONFIG, config.model_dump_json(indent=2) + "\n")


def versions(engine: ResumableEngine, task: str) -> dict[str, str]:
    """All that the last bits of a run depend on, its settings aside."""
    packages = ("textpolicy", *engine.packages, "numpy", "transformers")
    found = {name: importlib.metadata.version(name) for name in packages}
    own = task_file(task)
    code = {} if own is None else {own[0].name: hashlib.sha256(own[0].read_bytes()).hexdigest()[:16]}
    return {**found, **code, "python": platform.python_version(), "platform": platform.platform(), **engine.platform}
