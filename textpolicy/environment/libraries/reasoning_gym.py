"""reasoning-gym: every data set by name, composites and levels of its curricula, scored by its own scorers."""

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
    """An environment with ``size`` problems of a reasoning-gym data set, drawn with ``seed``.

    ``dataset`` is a name, or a composite: names with weights, or with {"weight": w, "config": {...}}. ``config`` are
    the data set's own settings; ``level`` takes them from its curriculum instead, from 0. Of several levels there
    are ``size`` problems each, whose examples have a "level", as a ``LevelCurriculum`` needs it. ``extract(text)``
    finds the answer in a completion, by default ``answer_of``; ``instructions`` follow every question. The example
    of a prompt is the library's entry (question, answer, metadata). With a ``time_limit`` in seconds the scorer runs
    in a process of its own, and an answer that takes it longer is unscorable. Further ``settings`` are those of
    ``TextGenerationEnv``. Raises UserError, MissingDependencyError.
    """
    levels: Sequence[int | None] = level if isinstance(level, Sequence) else [level]
    made = {n: make_dataset(dataset, size, seed, config, n) for n in levels}
    entries = [{**problems[i], "level": n} for n, problems in made.items() for i in range(size)]
    reward = EntryReward(made, extract or answer_of)
    return TextGenerationEnv(
        ["\n".join(filter(None, [entry["question"], instructions])) for entry in entries],
        reward if time_limit is None else _in_time(reward, time_limit),
        tokenizer=tokenizer,
        examples=entries,
        **settings,
    )


def _in_time(reward: EntryReward, seconds: float) -> Scorer:
    return Scorer(reward, time_limit=seconds, on_failure="unscorable", processes=True)


def make_dataset(
    dataset: str | Mapping[str, float | Mapping[str, Any]],
    size: int,
    seed: int,
    config: Mapping[str, Any] | None = None,
    level: int | None = None,
) -> Any:
    """The library's data set; arguments as in ``reasoning_gym_env``."""
    if size < 1:
        raise UserError(f"size is {size}; set it to 1 or more")
    if level is not None and (config or not isinstance(dataset, str)):
        raise UserError("level stands beside config or a composite; a level sets all settings of one data set itself")
    if not isinstance(dataset, str):
        return _create("composite", {"size": size, "seed": seed, "datasets": _specs(dataset)})
    if level is None:
        return _create(dataset, {**(config or {}), "size": size, "seed": seed})
    return _create_at(dataset, level, {"size": size, "seed": seed})


@dataclass(frozen=True, eq=False)
class EntryReward:
    """The reward: what the data set's own scorer says of the answer in a completion; correct is a full score.

    A scorer that raises at an answer has not accepted it: 0, and the first time of each kind is logged.
    """

    datasets: Mapping[int | None, Any]  # a reasoning_gym ProceduralDataset for each level in the examples
    extract: Callable[[str], str]
    logged: set[str] = field(default_factory=set)

    def __call__(self, prompt: str, completion: str, example: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        score = self._score(self.extract(completion), dict(example))
        return {"reward": score, "is_correct": score >= 1}

    def _score(self, answer: str, entry: dict[str, Any]) -> float:
        try:
            return float(self.datasets[entry.get("level")].score_answer(answer, entry))
        except Exception as error:  # noqa: BLE001 - some scorers raise at text they cannot parse
            kind = f"{entry['metadata'].get('source_dataset')}: {type(error).__name__}"
            if kind not in self.logged:
                self.logged.add(kind)
                logger.warning("a scorer of reasoning-gym raised (%s) at the answer %.80r, which got 0", kind, answer)
            return 0.0


def answer_of(text: str) -> str:
    """What stands in the last <answer> tag of ``text``; without one the last line that is not blank."""
    tagged = extra("reasoning_gym.utils", INSTALL).extract_answer(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return tagged if tagged is not None else (lines or [""])[-1]


INSTALL = "textpolicy[reasoning-gym]"


def _library() -> Any:
    extra("reasoning_gym", INSTALL)  # which registers its data sets
    return extra("reasoning_gym.factory", INSTALL)


def _create(name: str, settings: dict[str, Any]) -> Any:
    library = _library()
    _refuse_unknown(name, library)
    try:
        return library.create_dataset(name, **settings)
    except (AssertionError, TypeError, ValueError) as error:  # how the library refuses settings
        raise UserError(f"reasoning-gym's {name} cannot be made with {settings} ({error}); change them") from error


def _create_at(name: str, level: int, settings: dict[str, Any]) -> Any:
    """The data set with every setting of its curriculum at ``level``, or at the highest it has."""
    library = _library()
    _refuse_unknown(name, library)
    if not library.has_curriculum(name):
        raise UserError(f"reasoning-gym's {name} has no curriculum; leave level out and give config")
    if level < 0:
        raise UserError(f"level is {level}; set it to 0 or more")
    curriculum = library.create_curriculum(name)
    curriculum.set_global_level(level)
    dataset, _ = library.DATASETS[name]
    return dataset(config=curriculum.generate_configuration(settings))


def _specs(parts: Mapping[str, float | Mapping[str, Any]]) -> list[Any]:
    if not parts:
        raise UserError("a composite has no data sets; name at least one, with its weight")
    spec, library = extra("reasoning_gym.composite", INSTALL).DatasetSpec, _library()
    for name in parts:
        _refuse_unknown(name, library)
    given: dict[str, Mapping[str, Any]] = {
        name: part if isinstance(part, Mapping) else {"weight": part} for name, part in parts.items()
    }
    return [spec(name, part.get("weight", 1.0), dict(part.get("config", {}))) for name, part in given.items()]


def _refuse_unknown(name: str, library: Any) -> None:
    if name not in library.DATASETS:
        raise unknown_name("reasoning-gym data set", name, library.DATASETS)
