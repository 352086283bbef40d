"""The data sets of reasoning-gym: by name, composite or level of a curriculum, scored by their own scorers."""

from __future__ import annotations

import logging
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..._system.extras import extra
from ...errors import UserError, unknown_name
from ...rewards.answer import answered
from ...rewards.scoring import Scorer
from ..single_turn import TextGenerationEnv

logger = logging.getLogger(__name__)

INSTALL = "textpolicy[reasoning-gym]"
Parts = str | Mapping[str, float | Mapping[str, Any]]  # the name of a data set, or a composite
Entry = Mapping[str, Any]  # question, answer and metadata
WRONG = ("nonsense", "I do not know.", "?", " ", "nan")  # the answer to no question of the library
PLAUSIBLE = ("0", "1", "-1", "True", "False", "yes", "no", "[]", "{}", "None")  # the answer to some, as it is written
TRIED = 16  # entries of a data set, with each of those
CHILD = (  # the program of the process that draws
    "import pickle, sys; sys.path[:], job = pickle.load(sys.stdin.buffer); "
    "from textpolicy.environment.libraries.reasoning_gym import write_entries; write_entries(*job)"
)
INSTRUCTIONS = "Give your answer between <answer> and </answer>, and nothing else there."


def reasoning_gym_env(
    dataset: Parts,
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
    entries = [{**entry, "level": n} for n, problems in made.items() for entry in problems.entries]
    reward: Any = EntryReward({n: problems.library for n, problems in made.items()}, extract or answer_of)
    if time_limit is not None:
        reward = Scorer(reward, time_limit=time_limit, on_failure="unscorable", processes=True)
    return TextGenerationEnv(
        ["\n".join(filter(None, [entry["question"], instructions])) for entry in entries],
        reward,
        tokenizer=tokenizer,
        examples=entries,
        **settings,
    )


@dataclass(frozen=True, eq=False)
class Drawn:
    """The entries of a data set, the same in every process, and the library's data set, which scores them."""

    entries: Sequence[Entry]
    library: Any

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Entry:
        return self.entries[i]

    def score_answer(self, answer: str, entry: Entry) -> float:
        """Return the score of the library's own scorer."""
        return self.library.score_answer(answer, dict(entry))


def make_dataset(
    dataset: Parts,
    size: int,
    seed: int,
    config: Mapping[str, Any] | None = None,
    level: int | None = None,
    choose: Callable[[Iterator[Entry]], list[Entry]] = list,
) -> Drawn:
    """Return ``size`` entries, or those that ``choose`` takes of them; the other arguments are ``reasoning_gym_env``'s.

    Some of the library's data sets depend on Python's hash seed or on generators without a seed, so another process
    draws them, with all of these set. Data sets that your program registered are drawn in this process. Raises
    UserError, also for a data set whose scorer gives full marks to nonsense.
    """
    library = library_dataset(dataset, size, seed, config, level)
    kinds = extra("reasoning_gym.factory", INSTALL).DATASETS
    names = [dataset] if isinstance(dataset, str) else [*dataset]
    if all(kinds[name][0].__module__.startswith("reasoning_gym.") for name in names):
        with closing(_drawn_by_child((dataset, size, seed, config, level), " + ".join(names))) as entries:
            made = Drawn(choose(entries), library)
    else:
        made = Drawn(choose(library[i] for i in range(size)), library)
    by_source: dict[str, list[Entry]] = {}
    for entry in made.entries:
        by_source.setdefault(str(entry["metadata"].get("source_dataset", names[0])), []).append(entry)
    for name, entries_of_one in by_source.items():
        refuse_lenient(name, library, entries_of_one[:TRIED])
    return made


def refuse_lenient(name: str, library: Any, entries: Sequence[Entry]) -> None:
    """Raise UserError if nonsense scores like the answer: WRONG for one of the ``entries``, PLAUSIBLE for several.

    What nonsense must not reach is the score of the entry's own answer, or 1 if it names none. A PLAUSIBLE answer may
    equal another way to write it; that it equals all answers, which differ, or three of them, is a fault.
    """

    def score(answer: Any, entry: Entry) -> float:
        with suppress(Exception):  # the scorers raise at what they cannot read
            return score_of(library, answer, entry)
        return 0.0

    full = [score(entry["answer"], entry) or 1.0 for entry in entries]
    answers = [entry["question"] if entry["answer"] is None else _value(entry["answer"]) for entry in entries]
    for text in (*WRONG, *PLAUSIBLE):
        passed = [score(text, entry) >= most for entry, most in zip(entries, full, strict=True)]
        wrong = [i for i, answer in enumerate(answers) if passed[i] and answer != _value(text)]
        several = (all(passed) and len({*answers}) > 1) or len({answers[i] for i in wrong}) > 2
        if wrong and (text in WRONG or several):
            raise UserError(
                f"the scorer of reasoning-gym's {name} gives full marks to {text!r} where the answer is "
                f"{entries[wrong[0]]['answer']!r:.60}; use another data set, or a reward of your own"
            )


def _value(answer: Any) -> float | str:
    """Return a number, or a text without case, by which two answers are compared; NaN is a text."""
    text = str(answer).strip().casefold()
    with suppress(ValueError):
        return text if math.isnan(float(text)) else float(text)
    return text


def score_of(library: Any, answer: str, entry: Entry) -> float:
    """Return the score of the library's own scorer, from 0 to 1. Raises what it raises, and ValueError for another."""
    score = float(library.score_answer(answer, dict(entry)))
    if not 0 <= score <= 1:
        raise ValueError(f"a score of {score}")
    return score


def write_entries(dataset: Parts, size: int, seed: int, config: Mapping[str, Any] | None, level: int | None) -> None:
    """Write the pickled entries of a data set to standard output, one by one, or the text of the error that ends them.

    The generators of Python and NumPy get the ``seed``, for the data sets that draw from them.
    """
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints is no entry
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        made = library_dataset(dataset, size, seed, config, level)
        for i in range(size):
            output.write(pickle.dumps(made[i]))
            output.flush()
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that waits raises it
        output.write(pickle.dumps(f"{type(error).__name__}: {error}"))
    output.close()


def _drawn_by_child(
    job: tuple[Parts, int, int, Mapping[str, Any] | None, int | None], name: str
) -> Generator[Entry, None, None]:
    """Yield the entries that ``write_entries`` writes in a process with hash seed 0. Raises UserError."""
    command, variables = [sys.executable, "-W", "ignore", "-c", CHILD], {**os.environ, "PYTHONHASHSEED": "0"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(pickle.dumps((sys.path, job)))
            child.stdin.close()
            for _ in range(job[1]):
                entry = pickle.load(child.stdout)
                if isinstance(entry, str):
                    raise UserError(f"reasoning-gym's {name} cannot be drawn ({entry}); change its settings")
                yield entry
        except (EOFError, OSError) as error:
            raise UserError(f"the process that draws reasoning-gym's {name} died ({error}); run it again") from error
        finally:
            child.kill()


def library_dataset(
    dataset: Parts, size: int, seed: int, config: Mapping[str, Any] | None = None, level: int | None = None
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
        why = str(error)[:200]
        raise UserError(f"reasoning-gym's {name} cannot be made with {settings} ({why}); change them") from error


@dataclass(frozen=True, eq=False)
class EntryReward:
    """The reward: the score of the data set's own scorer for the answer in a completion; a full score is correct.

    A scorer that raises, or gives no number from 0 to 1, has not accepted the answer: the reward is 0, and the first
    error of each kind is logged.
    """

    datasets: Mapping[int | None, Any]  # for each level in the examples what has ``score_answer(answer, entry)``
    extract: Callable[[str], str]
    logged: set[str] = field(default_factory=set)

    def __call__(
        self,
        prompt: str,
        completion: str,
        example: Mapping[str, Any],
        thinking: str = "",
        truncated: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """Return the reward and is_correct of a completion: of what it says after its thought, unless it was cut off.

        An answer in a tag that closed is complete, whatever was cut off after it.
        """
        said = answered(completion, thinking)
        if said is None or (truncated and self.extract is answer_of and "</answer>" not in said):
            return {"reward": 0.0, "is_correct": False}
        answer, score = self.extract(said), 0.0
        try:
            score = score_of(self.datasets[example.get("level")], answer, example)
        except Exception as error:  # noqa: BLE001 - some scorers raise at text they cannot parse
            kind = f"{example['metadata'].get('source_dataset')}: {type(error).__name__}"
            if kind not in self.logged:
                self.logged.add(kind)
                logger.warning("a scorer of reasoning-gym raised (%s) at the answer %.80r, which got 0", kind, answer)
        return {"reward": score, "is_correct": score >= 1}


def answer_of(text: str) -> str:
    """Return the content of the last <answer> tag of ``text``; without a tag, the last line that is not blank."""
    tagged = extra("reasoning_gym.utils", INSTALL).extract_answer(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return tagged if tagged is not None else (lines or [""])[-1]
