"""The data sets of reasoning-gym: by name, composite or level of a curriculum, scored by their own scorers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..._system.extras import extra
from ...errors import UserError, unknown_name
from ...rewards.scoring import Scorer
from ..single_turn import TextGenerationEnv

logger = logging.getLogger(__name__)

INSTALL = "textpolicy[reasoning-gym]"
INSTRUCTIONS = "Give your answer between <answer> and </answer>, and nothing else there."


def reasoning_gym_env(
    dataset: str | Mapping[str, float | Mapping[str, Any]],
    size: int = 500,
    *,
    tokenizer: Any,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    level: int | Sequence[int] | None = None,
    instructions: str = INSTRUCTIONS,
    extract: Callable[[str], str] | None = None,
    time_limit: float | None = None,
    **settings: Any,
) -> TextGenerationEnv:
    """Return an environment with ``size`` problems of a reasoning-gym data set, drawn with ``seed``.

    ``dataset`` is a name, or a composite: names with weights, or with {"weight": w, "config": {...}}. ``config`` are
    the data set's own settings; ``level`` takes them from its curriculum instead, from 0. For several levels there
    are ``size`` problems each, whose examples have a "level". ``extract(text)``
    finds the answer in a completion, by default ``answer_of``; ``instructions`` follow every question. The example
    of a prompt is the library's entry (question, answer, metadata). With a ``time_limit`` in seconds the scorer runs
    in a process of its own, and an answer that takes longer is unscorable. The other ``settings`` are those of
    ``TextGenerationEnv``. Raises UserError, MissingDependencyError.
    """
    levels: Sequence[int | None] = level if isinstance(level, Sequence) else [level]
    made = {n: make_dataset(dataset, size, seed, config, n) for n in levels}
    entries = [{**problems[i], "level": n} for n, problems in made.items() for i in range(size)]
    reward: Any = EntryReward(made, extract or answer_of)
    if time_limit is not None:
        reward = Scorer(reward, time_limit=time_limit, on_failure="unscorable", processes=True)
    return TextGenerationEnv(
        ["\n".join(filter(None, [entry["question"], instructions])) for entry in entries],
        reward,
        tokenizer=tokenizer,
        examples=entries,
        **settings,
    )


def make_dataset(
    dataset: str | Mapping[str, float | Mapping[str, Any]],
    size: int,
    seed: int,
    config: Mapping[str, Any] | None = None,
    level: int | None = None,
) -> Any:
    """Return the library's data set; the arguments are those of ``reasoning_gym_env``. Raises UserError."""
    if size < 1:
        raise UserError(f"size is {size}; set it to 1 or more")
    if level is not None and (config or not isinstance(dataset, str)):
        raise UserError("level is given with config or a composite; a level sets all settings of one data set itself")
    if not isinstance(dataset, str) and not dataset:
        raise UserError("a composite has no data sets; name at least one, with its weight")
    extra("reasoning_gym", INSTALL)  # registers its data sets
    library = extra("reasoning_gym.factory", INSTALL)
    for known in [dataset] if isinstance(dataset, str) else dataset:
        if known not in library.DATASETS:
            raise unknown_name("reasoning-gym data set", known, library.DATASETS)
    settings: dict[str, Any] = {"size": size, "seed": seed}
    if level is not None:
        if not library.has_curriculum(dataset):
            raise UserError(f"reasoning-gym's {dataset} has no curriculum; leave level out and give config")
        if level < 0:
            raise UserError(f"level is {level}; set it to 0 or more")
        curriculum = library.create_curriculum(dataset)
        curriculum.set_global_level(level)  # or the highest it has
        kind, _ = library.DATASETS[dataset]
        return kind(config=curriculum.generate_configuration(settings))
    if isinstance(dataset, str):
        name, settings = dataset, {**(config or {}), **settings}
    else:
        spec = extra("reasoning_gym.composite", INSTALL).DatasetSpec
        parts: dict[str, Any] = {
            name: part if isinstance(part, Mapping) else {"weight": part} for name, part in dataset.items()
        }
        specs = [spec(name, part.get("weight", 1.0), dict(part.get("config", {}))) for name, part in parts.items()]
        name, settings = "composite", {**settings, "datasets": specs}
    try:
        return library.create_dataset(name, **settings)
    except (AssertionError, TypeError, ValueError) as error:  # the library's ways to refuse settings
        raise UserError(f"reasoning-gym's {name} cannot be made with {settings} ({error}); change them") from error


@dataclass(frozen=True, eq=False)
class EntryReward:
    """The reward: the score of the data set's own scorer for the answer in a completion; a full score is correct.

    A scorer that raises has not accepted the answer: the reward is 0, and the first error of each kind is logged.
    """

    datasets: Mapping[int | None, Any]  # a reasoning_gym ProceduralDataset for each level in the examples
    extract: Callable[[str], str]
    logged: set[str] = field(default_factory=set)

    def __call__(self, prompt: str, completion: str, example: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        """Return the reward and is_correct of a completion."""
        answer, entry, score = self.extract(completion), dict(example), 0.0
        try:
            score = float(self.datasets[entry.get("level")].score_answer(answer, entry))
        except Exception as error:  # noqa: BLE001 - some scorers raise at text they cannot parse
            kind = f"{entry['metadata'].get('source_dataset')}: {type(error).__name__}"
            if kind not in self.logged:
                self.logged.add(kind)
                logger.warning("a scorer of reasoning-gym raised (%s) at the answer %.80r, which got 0", kind, answer)
        return {"reward": score, "is_correct": score >= 1}


def answer_of(text: str) -> str:
    """Return the content of the last <answer> tag of ``text``; without a tag, the last line that is not blank."""
    tagged = extra("reasoning_gym.utils", INSTALL).extract_answer(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return tagged if tagged is not None else (lines or [""])[-1]
