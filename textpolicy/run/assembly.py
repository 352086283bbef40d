"""Build a run's parts from its settings: engine, environments, schedule, sampling, spending, and its folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from .._system.files import fill_whole, is_litter, write_whole
from ..algorithms import Algorithm
from ..algorithms.entropy_bonus import EntropyControl
from ..algorithms.sepa import SEPAController
from ..config.recipe import configure
from ..config.settings import CheckpointSettings, Config, EvaluationSettings, RolloutSettings, check_config
from ..devices.team import ALONE, Team
from ..engine import ResumableEngine, Sampling, stop_tokens
from ..environment.demonstrations import demonstrations
from ..environment.multi_turn import ToolEnv
from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError
from ..loop.curriculum import EveryPrompt, PassRateCurriculum
from ..loop.on_policy import OnPolicyCheck
from ..loop.teacher import Teacher, refuse_other_tokens
from ..loop.train import Schedule
from ..record import layout
from ..rewards.scoring import Scorer
from ..tasks import Problem, Task, load_task
from ..tasks.own import named_rows, short_name, task_file
from ..types import Episode
from .checkpoint import Checkpoint
from .resume import BASE, QUESTIONS, saved_settings
from .spending import Free

if TYPE_CHECKING:
    from ..mlx.memory import Plan
    from .spending import Spending

_COMPILE: dict[str, bool | Literal["auto"]] = {"auto": "auto", "on": True, "off": False}


@dataclass(frozen=True)
class Parts:
    """The parts of a run."""

    config: Config  # that they were made from
    title: str  # algorithm, task and model, for people to read
    engine: ResumableEngine
    tokenizer: Any
    splits: Mapping[str, TextGenerationEnv]  # train; validation and test where the task has such problems
    recipe: Algorithm
    controller: SEPAController | None  # of SEPA
    entropy: EntropyControl | None  # of the entropy bonus
    curriculum: EveryPrompt  # or a subclass
    rollout: RolloutSettings
    sampling: Sampling  # in training
    greedy: Sampling  # in evaluation
    schedule: Schedule
    check: OnPolicyCheck
    evaluation: EvaluationSettings
    checkpoint: CheckpointSettings
    max_skipped: int  # steps in a row that may be skipped because they were not finite
    spending: Spending
    versions: Mapping[str, str]  # of now: the file of a task may be edited or moved later
    stage: str | None = None  # its kind, numbered where there are several; None in a run without stages
    demonstrations: Sequence[Episode] = ()  # of a stage of sft
    held_out: Sequence[Episode] = ()  # demonstrations whose loss is measured
    teacher: Teacher | None = None  # of a stage of distillation
    team: Team = ALONE  # the ranks that train together
    following: tuple[Parts, ...] = ()  # the parts of the stages after this one


def assemble(config: Config, task: Task | None = None, recipe: Algorithm | None = None, threads: int = 0) -> Parts:
    """Build the parts of a run; its ``task`` and ``recipe`` are those that ``config`` and its stages name unless given.

    They are those of its first stage, with those of the stages that follow. ``threads`` are those of a run to resume.

    Raises UserError, and ServiceError from a server.
    """
    task = load_task(config.task) if task is None else task
    config = with_max_tokens(config, task)
    stages = config.stages
    recipes = [recipe or configure(stage) for stage in stages]
    engine, tokenizer = build_engine(stages[0], recipes[0], threads)
    try:
        task, limit = with_scorer(task, config), config.evaluation.problems or None
        problems = {"train": task.train, "validation": task.validation[:limit], "test": task.test[:limit]}
        present = {name: some for name, some in problems.items() if some or name == "train"}
        splits = {name: environment(task, some, tokenizer, config) for name, some in present.items()}
        spending: Spending = Free()
        if config.engine == "tinker":
            from ..tinker.spending import budget

            spending = budget(stages[0], recipes[0], task, engine, splits)  # of the one that there is
        made, first, tokens = list[Parts](), 0, config.rollout.max_tokens
        shown = [_demonstrations(own, task, tokenizer) for own in stages]
        of_now = {**versions(engine, config.task), QUESTIONS: task.digest, **base_of(config)}
        for n, rows in enumerate(shown, 1):
            for name, episodes in rows.items():
                learned = b"".join(e.tokens.tobytes() + e.mask.tobytes() for e in episodes)
                of_now[f"{name.replace('_', ' ')} of stage {n}"] = hashlib.sha256(learned).hexdigest()[:16]
        kinds = [own.stage[0].kind for own in stages if own.stage]
        for n, (own, how, rows) in enumerate(zip(stages, recipes, shown, strict=True), 1):
            curriculum = PassRateCurriculum if own.rollout.curriculum == "pass_rate" else EveryPrompt
            parts = Parts(
                config,
                title=_title(config),
                engine=engine,
                tokenizer=tokenizer,
                splits=splits,
                recipe=how,
                controller=how.controller(),
                entropy=how.entropy_control(),
                curriculum=curriculum(len(splits["train"]), seed=config.seed),
                rollout=own.rollout,
                sampling=Sampling(tokens, own.rollout.temperature, seed=config.seed),
                greedy=Sampling(tokens, temperature=0.0),
                schedule=replace(schedule(own), first=first),
                check=OnPolicyCheck(**own.on_policy.model_dump(), corrected=how.surrogate.correction is not None),
                evaluation=config.evaluation,
                checkpoint=config.checkpoint,
                max_skipped=config.optimizer.max_skipped,
                spending=spending,
                versions=of_now,
                stage=None if not kinds else kinds[n - 1] if kinds.count(kinds[n - 1]) == 1 else f"{kinds[n - 1]}-{n}",
                demonstrations=rows.get("demonstrations", ()),
                held_out=rows.get("held_out", ()),
                teacher=_teacher(own, tokenizer),
            )
            made.append(parts)
            first = parts.schedule.end
        return replace(made[0], following=tuple(made[1:]))
    except BaseException:
        engine.close("errored")
        raise


def _title(config: Config) -> str:
    """Return what the run does, for people to read."""
    stages = " then ".join(stage.kind for stage in config.stage)
    return f"{stages or config.algorithm.name} on {config.task} with {config.model}"


def _demonstrations(config: Config, task: Task, tokenizer: Any) -> dict[str, list[Episode]]:
    """Return the demonstrations of a stage of sft, and those of which the loss is measured, as fields of its parts."""
    if not config.stage or config.stage[0].kind != "sft":
        return {}
    [stage] = config.stage
    answers = [
        {"prompt": task.prompt(p.question), "completion": p.answer} for p in task.train if p.answer not in ("", None)
    ]
    template: dict[str, Any] = {"template_args": config.prompt.template_args, "day": config.prompt.day}
    found = {}
    for name, given in {"demonstrations": stage.data, "held_out": stage.validation}.items():
        if given is not None or name == "demonstrations":
            rows, source = (answers, f"the answers of {config.task}") if given is None else (named_rows(given), given)
            found[name] = demonstrations(rows, tokenizer=tokenizer, source=source, **template)
    return found


def _teacher(config: Config, tokenizer: Any) -> Teacher | None:
    """Return the teacher of a stage of distillation, loaded if it is another model. Raises UserError."""
    if not config.stage or config.stage[0].kind != "distill":
        return None
    [stage], remote = config.stage, config.engine == "tinker"
    if stage.teacher in ("base", "self"):
        return Teacher(None, stage.teacher == "base", stage.context, remote, stage.beta)
    if remote:
        raise UserError(
            f"stage.teacher is {stage.teacher} and engine tinker, where the model is its own teacher; set it to base "
            "or self, or use --engine mlx"
        )
    from ..mlx.engine import MLXEngine
    from ..mlx.models import load_model

    model, theirs = load_model(*_model_of_teacher(stage.teacher))
    refuse_other_tokens(tokenizer, theirs, stage.teacher)
    scorer = MLXEngine(model, stop=stop_tokens(theirs), micro_batch_tokens=config.machine.micro_batch_tokens)
    return Teacher(scorer, context=stage.context, beta=stage.beta)


def _model_of_teacher(name: str) -> tuple[str, Path | None]:
    """Return the model that a stage's teacher is, and the adapter if it is a run. Raises UserError."""
    adapter = Path(name) / "adapter"
    return (check_config(saved_settings(Path(name)), name).model, adapter) if adapter.is_dir() else (name, None)


def build_engine(config: Config, recipe: Algorithm | None = None, threads: int = 0) -> tuple[Any, Any]:
    """Return the engine with a fresh adapter, and the tokenizer.

    ``recipe`` is what it must be able to learn from, and ``threads`` the BLAS threads that a run to resume had.
    """
    if config.engine == "tinker":
        from ..tinker.build import build

        return build(config, recipe or configure(config))
    from ..mlx.adapters.merging import attach
    from ..mlx.blas import set_blas_threads  # the first import of mlx, and what it costs, is here
    from ..mlx.engine import MLXEngine
    from ..mlx.kernels.plain import refuse_kernels_alone
    from ..mlx.models import load_model

    if threads := config.machine.threads or threads:
        set_blas_threads(threads)
    refuse_beyond_context(config, config.rollout.max_tokens, "a completion")
    adapter = config.adapter.chosen()
    model, tokenizer = load_model(config.model, dequantize=adapter.dequantize)
    refuse_kernels_alone(model)
    attach(model, adapter, config.seed)
    engine = MLXEngine(
        model,
        stop=stop_tokens(tokenizer),
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        micro_batch_tokens=config.machine.micro_batch_tokens,
        decode_rows=config.machine.decode_rows,
        checkpoint_every=config.machine.checkpoint_every,
        compile=_COMPILE[config.machine.compile],
    )
    return engine, tokenizer


def fit_memory(parts: Parts, checkpoint: Checkpoint | None = None) -> Plan | None:
    """Give an engine on this machine sizes whose predicted peak fits into memory; raises UserError where none does.

    A run that resumes from ``checkpoint`` keeps its sizes, unless its settings of the machine have changed.
    """
    config = parts.config
    if config.engine != "mlx":
        return None
    from ..mlx.memory import Workload, limit_memory, preflight

    limit = config.machine.memory_limit_gb
    limit = None if limit is None else limit * 1e9  # bytes
    if checkpoint is not None and checkpoint.state["config"]["machine"] == config.machine.model_dump():
        limit_memory(limit)
        return None
    longest = {name: max(len(env.prompt_ids(i)) for i in range(len(env))) for name, env in parts.splits.items()}
    tokens = parts.splits["train"].episode_tokens
    refuse_beyond_context(config, max(longest.values()) + tokens, "the longest prompt with what may follow it")
    works = []
    for stage in (parts, *parts.following):
        rows, sizes = stage.rollout.prompts_per_step, (stage.rollout.group_size, longest["train"], tokens)
        if shown := [*stage.demonstrations, *stage.held_out]:
            starts = [int(np.argmax(e.mask)) for e in shown]
            refuse_beyond_context(config, max(len(e.tokens) for e in shown), "the longest demonstration")
            sizes = (1, max(starts), max(len(e.tokens) - n for e, n in zip(shown, starts, strict=True)))
        works.append((rows, *sizes))
    training = Workload(*map(max, zip(*works, strict=True)))  # of the stages together, at most
    held_out = [Workload(len(parts.splits[name]), 1, longest[name], tokens) for name in longest if name != "train"]
    engine: Any = parts.engine
    stages = (parts, *parts.following)
    taught = (stage.teacher for stage in stages if stage.teacher is not None and stage.teacher.beta is not None)
    teachers: list[Any] = [teacher.scorer or engine for teacher in taught]
    return preflight(
        engine,
        training,
        held_out,
        limit,
        copies=1,  # the best so far
        entropy=any(stage.entropy is not None for stage in stages),
        teachers=[teacher.model for teacher in teachers],
    )


def refuse_beyond_context(config: Config, tokens: int, what: str) -> None:
    """Raise UserError for more ``tokens`` than the context of the model, where its config gives that."""
    from ..mlx.models import context_length

    context = context_length(config.model)
    if context is not None and tokens > context:
        raise UserError(
            f"{what} has {tokens} tokens and the context of {config.model} {context}; lower rollout.max_tokens "
            "(and rollout.max_turns or rollout.max_episode_tokens in a task with tools), or shorten the prompts"
        )


def price(config: Config, expected_tokens: int | None = None) -> Sequence[str]:
    """Return what a run on a Tinker server may cost, line by line, without a server. Raises UserError as the run."""
    from ..tinker.build import refuse_unhonoured
    from ..tinker.spending import quote_run

    task = load_task(config.task)
    [config] = with_max_tokens(config, task).stages
    recipe = configure(config)
    refuse_unhonoured(config, recipe)
    return quote_run(config, recipe, task, expected_tokens)


def environment(task: Task, problems: Sequence[Problem], tokenizer: Any, config: Config) -> TextGenerationEnv:
    """Return the task's prompts, reward and tools over one split."""
    prompts, examples = [task.prompt(p.question) for p in problems], [p.example for p in problems]
    rollout = config.rollout
    template: dict[str, Any] = {"template_args": config.prompt.template_args, "day": config.prompt.day}
    if not task.tools:
        template |= {"tokenizer": tokenizer, "examples": examples}
        return TextGenerationEnv(prompts, task.reward, rollout.max_tokens, **template)
    return ToolEnv(
        prompts,
        task.tools,
        task.reward,
        rollout.max_tokens,
        tokenizer=tokenizer,
        examples=examples,
        max_turns=rollout.max_turns,
        max_episode_tokens=rollout.max_episode_tokens or rollout.max_turns * rollout.max_tokens,
        **template,
    )


def with_scorer(task: Task, config: Config) -> Task:
    """Return ``task`` with its reward called as ``config.rewards`` says, by one Scorer for all splits."""
    return replace(task, reward=Scorer(task.reward, **config.rewards.model_dump()))


def with_max_tokens(config: Config, task: Task) -> Config:
    """Return ``config`` with completions of the task's length, unless ``rollout.max_tokens`` is set."""
    if task.max_tokens is None or "max_tokens" in config.rollout.model_fields_set:
        return config

    def fitted(settings: Any) -> Any:
        rollout = settings.rollout.model_copy(update={"max_tokens": task.max_tokens})
        return settings.model_copy(update={"rollout": rollout})

    return cast(Config, fitted(config).model_copy(update={"stage": tuple(map(fitted, config.stage))}))


def with_full_paths(config: Config) -> Config:
    """Return ``config`` with its local paths in full, so that the run is found from any folder; other names stay."""
    changes: dict[str, Any] = {} if task_file(config.task) is None else {"task": full_task(config.task)}
    if config.engine == "mlx":
        from ..mlx.models import full_name

        changes["model"] = full_name(config.model)
    stages = []
    for stage in config.stage:
        rows = {name: getattr(stage, name) for name in ("data", "validation") if getattr(stage, name) is not None}
        full = {name: os.path.abspath(os.path.expanduser(path)) for name, path in rows.items()}
        if config.engine == "mlx" and stage.teacher not in ("base", "self"):
            full["teacher"] = full_name(stage.teacher)
        stages.append(_with_full_grams(stage).model_copy(update=full))
    return cast(Config, _with_full_grams(config).model_copy(update={**changes, "stage": tuple(stages)}))


def _with_full_grams(settings: Any) -> Any:
    """Return the settings of a run or a stage with the path of their grams in full."""
    if settings.algorithm.grams is None:
        return settings
    grams = Path(os.path.abspath(settings.algorithm.grams))
    return settings.model_copy(update={"algorithm": settings.algorithm.model_copy(update={"grams": grams})})


def full_task(name: str) -> str:
    """Return the ``name`` of a task, with the path in full if it is in a file."""
    return name if task_file(name) is None else os.path.abspath(os.path.expanduser(name))


def base_of(config: Config) -> dict[str, str]:
    """Return digests of the model's config, tokenizer, chat template and weights, and of each teacher that is loaded.

    There are none for a model on a server.
    """
    if config.engine != "mlx":
        return {}
    from ..mlx.models import identity_of

    found = {f"{BASE}{part}": digest for part, digest in identity_of(config.model).items()}
    for n, stage in enumerate(config.stage, 1):
        if stage.teacher not in ("base", "self"):
            name, adapter = _model_of_teacher(stage.teacher)
            parts = [json.dumps(identity_of(name)).encode()]
            parts += [file.read_bytes() for file in sorted(adapter.iterdir()) if not is_litter(file)] if adapter else []
            found[f"{BASE}teacher of stage {n}"] = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    return found


def refuse_long_warmup(config: Config) -> None:
    """Raise UserError for a warm-up that was asked for and is longer than a stage; the default one is shortened."""
    for stage in config.stages:
        o = stage.optimizer
        if "warmup_steps" in o.model_fields_set and o.warmup_steps > stage.steps:
            what = f"stage of {stage.stage[0].kind}" if stage.stage else "run"
            raise UserError(
                f"optimizer.warmup_steps is {o.warmup_steps} and steps {stage.steps}, so the {what} would end before "
                "the peak of the learning rate; set the warm-up to at most the steps"
            )


def schedule(config: Config) -> Schedule:
    """Return the steps, updates and learning rates of a run."""
    o = config.optimizer
    peak = o.learning_rate or config.adapter.chosen().learning_rate
    return Schedule(peak, config.steps, min(o.warmup_steps, config.steps), o.final_fraction, o.updates_per_step)


def try_folder(config: Config) -> None:
    """Make the run's folder and remove it again, before there is any work to lose. Raises UserError."""
    absent = [path for path in (config.output or Path("runs", "new")).parents if not path.exists()]
    try:
        absent.insert(0, claim_folder(config))
    finally:
        for path in absent:
            with suppress(OSError):  # it was not made, or another run has begun in it
                path.rmdir()


def claim_folder(config: Config) -> Path:
    """Make the run's folder: ``config.output``, or the first free name under runs/. Raises UserError."""
    path = config.output
    if path is None:
        name = f"{short_name(config.task)}-{config.algorithm.name}-seed{config.seed}"
        first = path = Path("runs") / re.sub(r"[^\w+.-]", "-", name).lstrip(".")
        n = 1
        while path.exists():
            n += 1
            path = first.with_name(f"{first.name}-{n}")
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {path} ({error.strerror}); choose another") from error
    return path


def write_setup(folder: Path, parts: Parts) -> None:
    """Write the resolved settings, the versions that run them, and the file of a task of one's own. Raises OSError."""
    if (own := task_file(parts.config.task)) is not None:
        code = own[0].read_bytes()
        fill_whole(folder / layout.TASK, lambda file: file.write(code))
    write_whole(folder / layout.VERSIONS, json.dumps(parts.versions, indent=2) + "\n")
    write_whole(folder / layout.CONFIG, parts.config.model_dump_json(indent=2) + "\n")


def versions(engine: ResumableEngine, task: str) -> dict[str, str]:
    """Return everything that the last bits of a run depend on, its settings aside."""
    packages = ("textpolicy", *engine.packages, "numpy", "transformers")
    found = {name: importlib.metadata.version(name) for name in packages}
    own = task_file(task)
    code = {} if own is None else {own[0].name: hashlib.sha256(own[0].read_bytes()).hexdigest()[:16]}
    return {**found, **code, "python": platform.python_version(), "platform": platform.platform(), **engine.platform}
