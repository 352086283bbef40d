"""Asking a model, bare or trained: what ``textpolicy generate`` and ``textpolicy eval`` do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config, check_config
from .engine import Sampling
from .environment.text_generation import TextGenerationEnv
from .errors import UserError
from .evaluation import evaluate as judge
from .run import environment
from .tasks import load_task

if TYPE_CHECKING:
    from .cli import EvalArguments, GenerateArguments, Source


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
    sampling = Sampling(asked.max_tokens, asked.temperature, asked.top_p, asked.repetition_penalty, asked.seed)
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
    config = source.config or Config(task=name)
    task = load_task(name)
    problems = getattr(task, asked.split)[: asked.problems or None]
    env = environment(task, problems, source.tokenizer, config)
    sampling = Sampling(asked.max_tokens or config.rollout.max_tokens, asked.temperature, seed=asked.seed)
    result = judge(source.engine, env, sampling)
    shown = [f"  {e.prompt!r} -> {e.text!r}  reward {e.reward:g}" for e in result.episodes[: asked.show]]
    rate = result.accuracy
    how = "greedy" if asked.temperature == 0 else f"sampled at temperature {asked.temperature:g}"
    return "\n".join([*shown, f"{name}, {asked.split}: {rate} of {rate.total} problems right, {how} (95% interval)"])


def load(source: Source) -> Loaded:
    """The engine of a run or of a model; exactly one of the two must be given."""
    if (source.run is None) == (source.model is None):
        raise UserError("give either --run RUN or --model NAME, not both or neither")
    config = None if source.run is None else _run_config(source.run)
    adapter = source.adapter if source.run is None else source.run / "adapter"
    from .mlx.blas import set_blas_threads
    from .mlx.engine import MLXEngine
    from .mlx.models import load_model

    if source.threads:
        set_blas_threads(source.threads)
    model, tokenizer = load_model(config.model if config else str(source.model), adapter)
    return Loaded(MLXEngine(model, stop=tokenizer.eos_token_ids), tokenizer, config)


def _run_config(folder: Path) -> Config:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no run folder ({path.name} cannot be read); give the folder of a run") from error
    return check_config(values, str(path))


def _no_reward(prompt: str, completion: str, example: dict[str, Any]) -> float:
    return 0.0
