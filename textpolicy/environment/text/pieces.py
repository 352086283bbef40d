"""The text of every sampled token, from a tokenizer's ``decode`` alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import numpy as np

from ...algorithms.grams import DEFAULT_STRATEGIC_GRAMS
from ...algorithms.planning import PlanningGrams, planning_mask
from ...rewards.answer import thought_marks
from ...rewards.contract import accepted_keywords

Decode = Callable[[list[int]], str]
_CHANNEL = re.compile(r"\0<\|channel\|>\0((?:[^\0]|\0<\|constrain\|>\0)*)\0<\|message\|>\0([^\0]*)")
BROKEN = "\ufffd"  # written by decoders for bytes that are not a whole character
LONGEST = 8  # tokens that may share characters: a character has at most 4 bytes, but a token may hold ends of two


@dataclass(eq=False, slots=True)
class Pieces:
    """The text of each of a completion's tokens, with the space in front of it; decoded texts are cached.

    The text of a token is what a second copy of it adds to the first, because many decoders drop the
    space at the start of a text. A character made of several tokens is the text of the first of them,
    and the others have "". Special tokens have "" where ``decode`` leaves them out.
    """

    decode: Decode
    alone: dict[int, str] = field(default_factory=dict)  # by id; BROKEN for part of a character
    together: dict[tuple[int, ...], str] = field(default_factory=dict)  # whole characters of several tokens

    def __call__(self, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
        """Return the texts of the tokens of one completion, (T,) ids."""
        tokens = np.asarray(ids, np.int64).tolist()
        for token in set(tokens):  # the difference with the known ones would walk through all of those
            if token not in self.alone:
                once = self.decode([token])
                self.alone[token] = BROKEN if BROKEN in once else self.decode([token, token])[len(once) :]
        texts = [self.alone[token] for token in tokens]
        if BROKEN not in texts:
            return tuple(texts)
        runs = groupby(zip(tokens, texts, strict=True), key=itemgetter(1))
        parts = [(text, [token for token, _ in run]) for text, run in runs]
        return tuple(chain.from_iterable(self._split(ids) if t == BROKEN else [t] * len(ids) for t, ids in parts))

    def _split(self, run: list[int]) -> list[str]:
        """Return the texts of tokens that are all parts of characters: whole characters, and the bytes between them."""
        texts: list[str] = []
        stray: list[int] = []  # tokens that begin no whole character
        while run:
            sizes = range(2, min(LONGEST, len(run)) + 1)
            size = next((n for n in sizes if BROKEN not in self._joint(run[:n])), 0)
            if size:
                texts += [*_first(self.decode, stray), self._joint(run[:size]), *[""] * (size - 1)]
                stray, run = [], run[size:]
            else:
                stray, run = [*stray, run[0]], run[1:]
        return [*texts, *_first(self.decode, stray)]

    def _joint(self, ids: list[int]) -> str:
        key = tuple(ids)
        if key not in self.together:
            self.together[key] = self.decode(ids)
        return self.together[key]


def _first(decode: Decode, ids: list[int]) -> list[str]:
    """Return the text of ``ids`` as that of the first of them."""
    return [decode(ids), *[""] * (len(ids) - 1)] if ids else []


def text_decode(tokenizer: Any, special: bool = False) -> Decode:
    """Return the tokenizer's ``decode`` with (``special``) or without special tokens, if it has that choice."""
    keywords = accepted_keywords(tokenizer.decode)
    chooses = keywords is None or "skip_special_tokens" in keywords
    return partial(tokenizer.decode, skip_special_tokens=not special) if chooses else tokenizer.decode


def spoken(parts: Sequence[tuple[bool, str]]) -> str:
    """Return the text of a turn, given as special tokens (True) and the texts between them.

    In channels (gpt-oss) it is the content of the last final one. Elsewhere only those special tokens are in it that
    mark a thought.
    """
    marked = "".join(f"\0{part}\0" if special else part.replace("\0", "") for special, part in parts)
    if channels := _CHANNEL.findall(marked):
        return next((content for header, content in reversed(channels) if header.strip().startswith("final")), "")
    marks, at, kept = thought_marks("".join(part for _, part in parts)), 0, []
    for special, part in parts:
        if not special or any(start < at + len(part) and at < end for start, end in marks):
            kept.append(part)
        at += len(part)
    return "".join(kept)


def identify_planning_tokens(
    token_ids: Sequence[int] | np.ndarray,
    tokenizer: Any,
    strategic_grams: Sequence[str] | None = None,
    max_window: int = 5,
) -> list[int]:
    """Return 1 for each token of one completion that is part of a strategic gram, 0 for the others.

    ``tokenizer`` needs decode(ids) -> text. None as ``strategic_grams`` means the default list.
    ``max_window`` has no effect: grams of any length are found. Raises UserError.
    """
    grams = PlanningGrams(DEFAULT_STRATEGIC_GRAMS if strategic_grams is None else strategic_grams)
    return planning_mask(Pieces(text_decode(tokenizer))(token_ids), grams).astype(int).tolist()
