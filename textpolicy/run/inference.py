"""Asking a model, bare or trained: what ``textpolicy generate`` and ``textpolicy eval`` do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from ..config.settings import Config, PositiveInt, Section, check_config
from ..engine import Sampling
from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError
from ..loop.evaluation import Evaluation
from ..loop.evaluation import evaluate as judge
from ..tasks import load_task
from .assembly import environment, with_max_tokens, with_scorer


class Source(Section):
    """What to ask: a trained run, or a model with or without an adapter."""

    run: Path | None = None
    """Folder of a run: its model, adapter and way of asking."""
    model: str | None = None
    """Built-in name, folder, .gguf file or hub id; instead of a run."""
    adapter: Path | None = None
    """A run whose adapter to use, or an adapter folder; without --model on the run's own model."""
    threads: Annotated[int, Field(ge=0)] = 0
    """BLAS threads on a Linux CPU; 0 leaves it to OpenBLAS."""


class GenerateArguments(Source):
    """Write a completion."""

    prompt: CliPositionalArg[str]
    """What to ask."""
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
    """Fixes what is drawn."""
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
    """Fixes what is drawn."""
    samples: PositiveInt = 1
    """Completions of each problem; more than 1 needs a temperature."""
    pass_at: list[PositiveInt] = Field(default_factory=list)
    """Also say pass@k, the chance that k completions hold a right one; give the flag once for each k."""
    show: Annotated[int, Field(ge=0)] = 5
    """Print so many completions."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked, and the settings of the run it comes from."""

    engine: Any
    tokenizer: Any
    config: Config | None


def generate(asked: GenerateArguments) -> str:
    """The completion of ``asked.prompt``, as text."""
    if not asked.prompt.strip():
        raise UserError("the prompt is empty; say what to ask")
    sampling = Sampling(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        repetition_penalty=asked.repetition_penalty,
        seed=asked.seed,
        top_k=asked.top_k,
        min_p=asked.min_p,
    )
    source = load(asked)
    prompt: Any = asked.prompt
    if source.config is not None and not asked.plain:
        prompt = load_task(source.config.task).prompt(asked.prompt)
    env = TextGenerationEnv(
        [prompt], _no_reward, asked.max_tokens, tokenizer=source.tokenizer, chat=False if asked.plain else None
    )
    completion = source.engine.sample([env.prompt_ids(0).tolist()], 1, sampling)[0][0]
    return env.text(completion.tokens)


def evaluate(asked: EvalArguments) -> str:
    """Accuracy with its interval, after a few completions."""
    source = load(asked)
    name = asked.task or (source.config.task if source.config else None)
    if name is None:
        raise UserError("no task to measure; name one with --task, or give a --run")
    task = load_task(name)
    config = source.config or with_max_tokens(Config(task=name), task)
    problems = getattr(task, asked.split)[: asked.problems or None]
    env = environment(with_scorer(task, config), problems, source.tokenizer, config)
    longest = config.rollout.max_tokens if asked.max_tokens is None else asked.max_tokens
    sampling = Sampling(longest, asked.temperature, seed=asked.seed)
    if too_many := [k for k in asked.pass_at if k > asked.samples]:
        raise UserError(f"pass_at is {too_many[0]} and samples {asked.samples}; set samples to that at least")
    result = judge(source.engine, env, sampling, asked.samples)
    shown = [f"  {e.prompt!r} -> {e.text!r}  reward {e.reward:g}" for e in result.episodes[: asked.show]]
    how = "greedy" if asked.temperature == 0 else f"sampled at temperature {asked.temperature:g}"
    return "\n".join([*shown, *_said(result, f"{name}, {asked.split}", how, asked)])


def _said(result: Evaluation, what: str, how: str, asked: EvalArguments) -> list[str]:
    """The figures, a line each."""
    if asked.samples == 1 and not asked.pass_at:
        rate = result.accuracy
        return [f"{what}: {rate} of {rate.total} problems right, {how} (95% interval)"]
    average = result.average
    over = f"over {average.problems} problems, {how} (95% interval)"
    lines = [f"{what}: avg@{asked.samples} {average} {over}"]
    return [*lines, *(f"{what}: pass@{k} {result.pass_at(k)} {over}" for k in sorted(set(asked.pass_at)))]


def load(source: Source) -> Loaded:
    """The engine of a run, of a model, or of the adapter of a run; UserError if that is not clear."""
    if source.run is not None and source.adapter is not None:
        raise UserError(f"--adapter {source.adapter} stands beside --run, which has its own; give one of them")
    if source.run is not None and source.model is not None:
        raise UserError("give either --run RUN or --model NAME, not both")
    run, adapter = _run_and_adapter(source)
    if run is None and source.model is None:
        raise UserError("nobody to ask; give either --run RUN or --model NAME, or the --adapter of a run")
    config = None if run is None else read_run(run)
    if config is not None and config.engine == "tinker" and adapter is not None:
        from ..tinker.build import kept

        engine = kept(config, adapter)
        return Loaded(engine, engine.tokenizer, config)
    from ..mlx.blas import set_blas_threads
    from ..mlx.engine import MLXEngine
    from ..mlx.models import load_model

    if source.threads:
        set_blas_threads(source.threads)
    model, tokenizer = load_model(config.model if config else str(source.model), adapter)
    return Loaded(MLXEngine(model, stop=tokenizer.eos_token_ids), tokenizer, config)


def _run_and_adapter(source: Source) -> tuple[Path | None, Path | None]:
    """The run whose settings count, and the adapter to load. An adapter's run is the folder itself or the one above."""
    if source.run is not None:
        return source.run, source.run / "adapter"
    given = source.adapter
    if given is None:
        return None, None
    inside = given / "adapter"
    run, adapter = (given, inside) if inside.is_dir() else (given.absolute().parent, given)
    if source.model is not None:
        return None, adapter
    if not (run / "config.json").is_file():
        raise UserError(f"{given} belongs to no run, which would say its base; name that with --model")
    return run, adapter


def read_run(folder: Path) -> Config:
    """The settings of the run in ``folder``. Raises UserError."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is no run folder ({path.name} cannot be read); give the folder of a run") from error
    return check_config(values, str(path))


def _no_reward(prompt: str, completion: str, example: dict[str, Any]) -> float:
    return 0.0
