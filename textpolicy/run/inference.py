"""Generate and evaluate with a model, bare or trained: ``textpolicy generate`` and ``textpolicy eval``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .._system.terminal import columns
from ..config.settings import (
    Config,
    LocalPath,
    ModelName,
    Positional,
    PositiveInt,
    RewardSettings,
    Section,
    TemplateArgs,
    check_config,
)  # fmt: skip
from ..engine import Sampling, stop_tokens
from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError
from ..loop.evaluation import evaluate as evaluate_engine
from ..loop.start_gate import StartGate
from ..record.layout import CONFIG
from ..record.reader import RecordedRun
from ..tasks import Task, load_task
from .assembly import base_of, environment, full_task, with_max_tokens, with_scorer
from .console import example_line
from .resume import other_base, saved_settings

logger = logging.getLogger(__name__)

GATE_SAMPLES = 16  # of each problem, at which starts are compared


class Source(Section):
    """The model to use: that of a trained run, or one with or without an adapter."""

    run: LocalPath | None = None
    """Folder of a run: its model, adapter and prompts."""
    model: ModelName | None = None
    """Built-in name, folder, .gguf file or hub id; instead of a run."""
    adapter: LocalPath | None = None
    """A run whose adapter to use, or an adapter folder; without --model on the run's own model."""
    template_args: TemplateArgs | None = None
    """Further arguments of the model's chat template, such as enable_thinking=false; a run's own if not given."""
    threads: Annotated[int, Field(ge=0)] = 0
    """BLAS threads on a Linux CPU; 0 leaves it to OpenBLAS."""

    def asking(self, config: Config) -> Config:
        """Return ``config`` with the arguments of the chat template that were given, if any."""
        if self.template_args is None:
            return config
        prompt = config.prompt.model_copy(update={"template_args": self.template_args})
        return config.model_copy(update={"prompt": prompt})


class GenerateArguments(Source):
    """Write a completion."""

    prompt: Annotated[str, Positional]
    """The prompt."""
    max_tokens: int = 256
    """Longest completion, in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely compared with the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already there become less likely."""
    seed: int = 0
    """Fixes the draws."""
    plain: bool = False
    """Ask as typed: without the worked examples of the run's task, or a chat template."""


class EvalArguments(Source):
    """Measure accuracy on a task's problems, with a 95% interval."""

    task: str | None = None
    """The task; a run's own if not given."""
    split: Literal["test", "validation", "train"] = "test"
    """Which of its problems."""
    problems: Annotated[int, Field(ge=0)] = 0
    """Only the first so many; 0 for all."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    max_tokens: int | None = None
    """Longest completion, in tokens; a run's own if not given."""
    seed: int = 0
    """Fixes the draws."""
    samples: PositiveInt = 1
    """Completions of each problem; more than 1 needs a temperature."""
    pass_at: list[PositiveInt] = Field(default_factory=list)
    """Also print pass@k, the chance that k completions include a correct one; give the flag once for each k."""
    start_gate: bool = False
    """Say whether rl can begin here: pass@k of 16 samples, the share of groups that would disagree, and the advice."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """With start_gate: completions in a group."""
    show: Annotated[int, Field(ge=0)] = 5
    """Print so many completions."""
    rewards: RewardSettings = RewardSettings()


@dataclass(frozen=True)
class Chosen:
    """The model that arguments name, before it is loaded, and the run it comes from."""

    name: str
    adapter: Path | None
    run: Path | None
    config: Config | None  # of the run


@dataclass(frozen=True)
class Loaded:
    """The loaded model, and the settings of the run it comes from."""

    engine: Any
    tokenizer: Any
    config: Config | None


def generate(args: GenerateArguments) -> str:
    """Return the completion of ``args.prompt``, as text; every argument is checked before the model is loaded."""
    if not args.prompt.strip():
        raise UserError("the prompt is empty; give some text")
    names = ("max_tokens", "temperature", "top_p", "repetition_penalty", "seed", "top_k", "min_p")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    chosen = choose(args)
    prompt: Any = args.prompt
    if chosen.config is not None and not args.plain:
        prompt = load_task(chosen.config.task).prompt(args.prompt)
    tokenizer, load_engine = prepare(chosen, args.threads)
    settings = args.asking(chosen.config or Config()).prompt
    template: dict[str, Any] = {"template_args": settings.template_args, "day": settings.day}
    template["chat"] = False if args.plain else None
    env = TextGenerationEnv([prompt], lambda **_: 0.0, args.max_tokens, tokenizer=tokenizer, **template)
    sampling = within_context(chosen, sampling, env, given="max_tokens" in args.model_fields_set)
    completion = load_engine().sample([env.prompt_ids(0).tolist()], 1, sampling)[0][0]
    return env.text(completion.tokens)


def evaluate(args: EvalArguments) -> str:
    """Return a few completions, and accuracy with its interval; arguments are checked before the model is loaded."""
    if args.start_gate:
        samples = max(GATE_SAMPLES, args.group_size) if args.samples == 1 else args.samples
        args = args.model_copy(update={"samples": samples, "temperature": args.temperature or 1.0})
    if too_many := [k for k in args.pass_at if k > args.samples]:
        raise UserError(f"pass_at is {too_many[0]} and samples {args.samples}; set samples to that at least")
    if args.samples > 1 and args.temperature == 0:
        raise UserError(
            f"{args.samples} samples at temperature 0 are all the same; set a temperature above 0, or 1 sample"
        )
    Sampling(1 if args.max_tokens is None else args.max_tokens, args.temperature, seed=args.seed)
    chosen = choose(args)
    config = chosen.config
    name = args.task or (config.task if config else None)
    if name is None:
        raise UserError("no task to measure; name one with --task, or give a --run")
    task = load_task(name)
    problems = getattr(task, args.split)[: args.problems or None]
    if config is None:
        config = with_max_tokens(Config(task=name), task)
    elif full_task(name) != config.task:
        config = of_another_task(config, name, task)
    rewards = {key: getattr(args.rewards, key) for key in args.rewards.model_fields_set}
    tokens = args.max_tokens or config.rollout.max_tokens
    changes = {
        "rewards": config.rewards.model_copy(update=rewards),
        "rollout": config.rollout.model_copy(update={"max_tokens": tokens}),
    }
    config = args.asking(config.model_copy(update=changes))
    sampling = Sampling(tokens, args.temperature, seed=args.seed)
    tokenizer, load_engine = prepare(chosen, args.threads)
    env = environment(with_scorer(task, config), problems, tokenizer, config)
    sampling = within_context(chosen, sampling, env, given=args.max_tokens is not None)
    result = evaluate_engine(load_engine(), env, sampling, args.samples)
    lines = [example_line(e, columns(), "  ") for e in result.episodes[: args.show]]
    what = f"{name}, {args.split}"
    how = "greedy" if args.temperature == 0 else f"sampled at temperature {args.temperature:g}"
    if args.samples == 1 and not args.pass_at:
        rate = result.accuracy
        lines.append(f"{what}: {rate} of {rate.total} problems right, {how} (95% interval)")
    else:
        average = result.average
        over = f"over {average.problems} problems, {how} (95% interval)"
        lines.append(f"{what}: avg@{args.samples} {average} {over}")
        lines += [f"{what}: pass@{k} {result.pass_at(k)} {over}" for k in sorted(set(args.pass_at))]
    if args.start_gate:
        gate = StartGate.of(result, args.group_size)
        lines.append(f"{what}: pass@{gate.samples} {gate.passed} {over}")
        lines.append(f"{what}: {gate.informative} of groups of {gate.group_size} would disagree")
        lines.append(gate.advice)
    return "\n".join(lines)


def of_another_task(config: Config, name: str, task: Task) -> Config:
    """Return a run's ``config`` for the task called ``name``, with its own length and idea of what is correct."""
    rollout = config.rollout
    if task.max_tokens is not None:
        rollout = rollout.model_copy(update={"max_tokens": task.max_tokens, "max_episode_tokens": None})
    rewards = config.rewards.model_copy(update={"correct_from": None})
    return config.model_copy(update={"task": name, "rollout": rollout, "rewards": rewards})


def choose(source: Source) -> Chosen:
    """Return the model of a run, a model by name, or the model and adapter of a run. Raises UserError if ambiguous."""
    if source.run is not None and source.adapter is not None:
        raise UserError(f"--adapter {source.adapter} is given with a run, which has its own; give one of them")
    if source.run is not None and source.model is not None:
        raise UserError("give either --run RUN or --model NAME, not both")
    run, adapter = source.run, None
    if source.run is not None:
        adapter = source.run / "adapter"
    elif source.adapter is not None:  # the folder of a run, or a folder in one
        inside = (source.adapter / "adapter").is_dir()
        adapter = source.adapter / "adapter" if inside else source.adapter
        if source.model is None:
            run = source.adapter if inside else source.adapter.absolute().parent
            if not (run / CONFIG).is_file():
                raise UserError(f"{source.adapter} is not part of a run, so its base is unknown; give it with --model")
    elif source.model is None:
        raise UserError("no model given; pass --run RUN, --model NAME, or the --adapter of a run")
    config = None if run is None else check_config(saved_settings(run), str(run))
    return Chosen(config.model if config else str(source.model), adapter, run, config)


def prepare(chosen: Chosen, threads: int = 0) -> tuple[Any, Callable[[], Any]]:
    """Return the tokenizer, and a function that loads the weights, which takes seconds. Raises UserError."""
    config = chosen.config
    if config is not None and config.engine == "tinker" and chosen.adapter is not None:
        from ..tinker.build import kept

        engine = kept(config, chosen.adapter)
        return engine.tokenizer, lambda: engine
    from ..mlx.adapters.saving import read_adapter
    from ..mlx.blas import set_blas_threads
    from ..mlx.engine import MLXEngine
    from ..mlx.memory import limit_memory
    from ..mlx.models import load_model, load_tokenizer

    if threads:
        set_blas_threads(threads)
    if chosen.adapter is not None:
        read_adapter(chosen.adapter)  # raises for what is no adapter
    tokenizer = load_tokenizer(chosen.name)
    stop = stop_tokens(tokenizer)

    def load_engine() -> Any:
        saved = {} if chosen.run is None else RecordedRun(chosen.run).versions
        if (
            config is not None
            and saved
            and (other := other_base(saved, base_of(config.model_copy(update={"stage": ()}))))
        ):
            run, name = chosen.run, config.model
            logger.warning("the run in %s was trained on %s with another %s than it has now", run, name, other)
        limit_memory()
        model, _ = load_model(chosen.name, chosen.adapter, tokenizer=tokenizer)
        return MLXEngine(model, stop=stop)

    return tokenizer, load_engine


def within_context(chosen: Chosen, sampling: Sampling, env: TextGenerationEnv, *, given: bool) -> Sampling:
    """Return ``sampling`` with completions that fit into the model's context behind every prompt of ``env``.

    Raises UserError where a prompt fills it, or where completions are too long and their length was ``given``.
    """
    if chosen.config is not None and chosen.config.engine == "tinker":
        return sampling  # the server knows
    from ..mlx.models import context_length

    context = context_length(chosen.name)
    longest = max(len(env.prompt_ids(i)) for i in range(len(env)))
    if context is None or longest + sampling.max_tokens <= context:
        return sampling
    if given or longest >= context:
        raise UserError(
            f"max_tokens is {sampling.max_tokens} and the longest prompt has {longest} tokens, which is more than the "
            f"context of {chosen.name}, {context}; lower --max-tokens, or shorten the prompts"
        )
    return replace(sampling, max_tokens=context - longest)


def load(source: Source) -> Loaded:
    """Load the model that ``source`` names. Raises UserError."""
    chosen = choose(source)
    tokenizer, load_engine = prepare(chosen, source.threads)
    return Loaded(load_engine(), tokenizer, chosen.config)
