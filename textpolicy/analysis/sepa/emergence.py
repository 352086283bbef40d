"""Log every completion and every step of a run, with its planning phrases, as JSON lines."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from ..._system.files import to_disk
from ...algorithms.grams import DEFAULT_STRATEGIC_GRAMS
from ...algorithms.planning import PlanningGrams, planning_mask
from ...buffer import Episode as BufferedEpisode
from ...environment.text.pieces import Pieces, text_decode
from ...errors import UserError
from ...types import Episode
from ..plain import plain

Example = Mapping[str, Any]
Extract = Callable[[Example, float], Mapping[str, Any]]  # example, reward -> metadata of the completion
CORRECT = 0.99  # a reward from here on counts as correct where the reward function gives no verdict
_WORD = re.compile(r"\S+")
_KEPT = ("target", "numbers")  # entries of an example that become metadata


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """The values of one completion that the logger reads."""

    prompt: str
    text: str
    pieces: tuple[str, ...]  # the text of each of its T tokens
    tokens: np.ndarray  # (T,) int
    logprobs: np.ndarray  # (T,) float, nats, under the distribution that sampled them
    reward: float  # NaN where it could not be scored
    is_correct: bool | None
    truncated: bool

    @property
    def correct(self) -> bool:
        """The reward function's verdict, or else whether the reward is (nearly) 1."""
        return self.reward >= CORRECT if self.is_correct is None else self.is_correct


class EmergenceLogger:
    """The writer of ``generations.jsonl`` and ``steps.jsonl`` in a folder, which it makes with the first step.

    A line is compact JSON, and both files are on the disk when ``log_step`` returns. Numbers that do not exist
    are null. ``entropy_per_token`` and every other "entropy" in these files is a surprisal, minus the log-prob of
    the sampled token: the names are those of version 0.1.11.
    """

    def __init__(
        self,
        output_dir: str | Path,
        planning_config: Sequence[str] | None = None,
        strategic_grams: Sequence[str] | None = None,
        metadata_extractor: Extract | None = None,
        max_completion_tokens: int | None = None,
    ) -> None:
        """Set the phrases, the metadata and the run's limit on completions.

        The tokens of the phrases in ``planning_config`` count as planning; the words and surprisals of those in
        ``strategic_grams`` are compared with the rest. Either is the other's list if None, and the default list if
        both are. ``metadata_extractor`` makes a completion's metadata of its example and reward.
        """
        phrases = next((p for p in (planning_config, strategic_grams) if p is not None), DEFAULT_STRATEGIC_GRAMS)
        self.planning = PlanningGrams(phrases)
        self.grams = PlanningGrams(phrases if strategic_grams is None else strategic_grams)
        self.folder, self.limit = Path(output_dir), max_completion_tokens
        self.extract = metadata_extractor
        self._pieces: tuple[Any, Pieces] | None = None  # of the last tokenizer

    def log_step(
        self,
        step: int,
        episodes: Sequence[Episode | BufferedEpisode | Mapping[str, Any]],
        tokenizer: Any,
        examples: Sequence[Example] | None = None,
        extra_step_metrics: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write a line for each completion and one for the step; return the latter.

        Episodes are those of a training loop, of a ``Buffer``, or their dicts; ``examples`` has one for each.
        ``tokenizer`` needs decode(ids) -> text, and is used for episodes without their text. Raises UserError.
        """
        started = time.perf_counter()
        if examples is not None and len(examples) != len(episodes):
            raise UserError(f"there are {len(examples)} examples for {len(episodes)} episodes; give one each")
        read = [self._read(episode, tokenizer) for episode in episodes]
        given: Any = repeat(None) if examples is None else examples
        records = [self._record(step, g, example) for g, example in zip(read, given, strict=False)]
        row = self._summary(step, read, records)
        row["logging_overhead_ms"] = 1000 * (time.perf_counter() - started)
        row |= extra_step_metrics or {}
        self._write("generations", records)
        self._write("steps", [row])
        return row

    def finish(self) -> None:
        """End the log; there is nothing to do, since no file stays open between steps."""

    def _read(self, episode: Episode | BufferedEpisode | Mapping[str, Any], tokenizer: Any) -> Generation:
        """Return the values of an episode of any kind."""
        match episode:
            case Episode():
                tokens = episode.tokens[episode.mask]
                pieces = episode.pieces or self._spelled(tokenizer)(tokens)
                text, prompt, source = episode.text or "".join(pieces).strip(), episode.prompt, episode
            case BufferedEpisode():
                source = episode.as_training()
                tokens = source.tokens[source.mask]
                pieces = self._spelled(tokenizer)(tokens)
                text, prompt = "".join(pieces).strip(), tokenizer.decode(source.tokens[~source.mask].tolist())
            case _:
                return self._read(BufferedEpisode.from_dict(episode), tokenizer)
        return Generation(
            prompt, text, pieces, tokens, source.logprobs[source.mask].astype(float), source.reward,
            source.is_correct, source.truncated,
        )  # fmt: skip

    def _spelled(self, tokenizer: Any) -> Pieces:
        """Return the decoder of ``tokenizer``, which caches the pieces that it decoded."""
        if self._pieces is None or self._pieces[0] is not tokenizer:
            self._pieces = tokenizer, Pieces(text_decode(tokenizer))
        return self._pieces[1]

    def _record(self, step: int, g: Generation, example: Example | None) -> dict[str, Any]:
        """Return the line of one completion."""
        planning = planning_mask(g.pieces, self.planning)
        planning_spans, gram_spans = self.planning.spans(g.text), self.grams.spans(g.text)
        words = [(m.start(), m.end()) for m in _WORD.finditer(g.text)]
        strategic = sum(any(a < end and start < b for a, b in gram_spans) for start, end in words)
        in_gram = planning_mask(g.pieces, self.grams)
        inside, outside = _mean(-g.logprobs[in_gram]), _mean(-g.logprobs[~in_gram])  # nats
        metadata: dict[str, Any] = {}
        if example is not None and self.extract is not None:
            metadata = {**self.extract(example, g.reward)}
        elif example is not None:
            metadata = {name: example[name] for name in _KEPT if name in example}
        if example is not None or g.is_correct is not None:
            metadata["correctness"] = g.correct
        return {
            "step": step,
            "prompt": g.prompt,
            "completion": g.text,
            "reward": g.reward,
            "num_tokens": len(g.tokens),
            "tokens": g.tokens.tolist(),
            "logprobs": np.round(g.logprobs, 6).tolist(),
            "entropy_per_token": np.round(-g.logprobs, 6).tolist(),
            "planning_phrases_found": sorted({g.text[a:b].lower() for a, b in planning_spans}),
            "planning_token_ratio": float(planning.mean()) if len(planning) else 0.0,
            "contains_strategic_gram": strategic > 0,
            "strategic_gram_word_count": strategic,
            "non_strategic_gram_word_count": len(words) - strategic,
            "strategic_gram_word_ratio": strategic / max(1, len(words)),
            "gram_entropy_mean": inside,
            "non_gram_entropy_mean": outside,
            "gram_entropy_delta": None if inside is None or outside is None else inside - outside,
            "metadata": metadata,
        }

    def _summary(self, step: int, read: Sequence[Generation], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the line of one step."""
        rewards = np.array([g.reward for g in read])
        scored = rewards[~np.isnan(rewards)]
        surprisal = -np.concatenate([g.logprobs for g in read]) if read else np.zeros(0)
        pairs = [r for r in records if r["gram_entropy_delta"] is not None]
        return {
            "step": step,
            "mean_reward": _mean(scored),
            "std_reward": float(scored.std()) if len(scored) else None,
            "mean_completion_length": _mean([len(g.tokens) for g in read]),
            "max_tokens_limit": self.limit,
            "max_tokens_hit_count": sum(g.truncated for g in read),
            "max_tokens_hit_rate": _mean([g.truncated for g in read]),
            "planning_token_ratio": _mean([r["planning_token_ratio"] for r in records]),
            "entropy_mean": _mean(surprisal),
            "entropy_std": float(surprisal.std()) if len(surprisal) else None,
            "strategic_gram_match_rate": _mean([r["contains_strategic_gram"] for r in records]),
            "strategic_gram_word_ratio": _mean([r["strategic_gram_word_ratio"] for r in records]),
            "gram_entropy_on_mean": _mean([r["gram_entropy_mean"] for r in pairs]),
            "gram_entropy_off_mean": _mean([r["non_gram_entropy_mean"] for r in pairs]),
            "gram_entropy_delta": _mean([r["gram_entropy_delta"] for r in pairs]),
            "gram_entropy_pair_count": len(pairs),
            "correct_count": sum(g.correct for g in read),
            "total_count": len(read),
        }

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append lines to a file and force it to disk, because sampling again would cost money."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(plain(row), separators=(",", ":")) + "\n" for row in rows)
            file.flush()
            to_disk(file.fileno())


def _mean(values: Any) -> float | None:
    """Return the mean, or None (null in JSON) for no values."""
    return float(np.mean(values)) if len(values) else None
