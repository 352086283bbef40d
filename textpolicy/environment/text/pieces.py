"""The text of every sampled token, from nothing but a tokenizer's ``decode``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from ...algorithms.grams import DEFAULT_STRATEGIC_GRAMS
from ...algorithms.planning import PlanningGrams, planning_mask
from ...rewards.registry import accepted_keywords

Decode = Callable[[list[int]], str]
BROKEN = "\ufffd"  # what decoders write for bytes that are no whole character
LONGEST = 8  # tokens that may share characters: a character has at most 4 bytes, but a token may hold ends of two


class Pieces:
    """Token ids -> the text of each, space in front included; what was decoded once is kept.

    A token's text is what a second copy of it adds to the first, because many decoders drop the
    space at the start of a text. A character made of several tokens is the text of the first of them,
    and the others have ''. Special tokens have '' when ``decode`` leaves them out.
    """

    def __init__(self, decode: Decode) -> None:
        """``decode`` takes a list of token ids and returns text, as a tokenizer's does."""
        self._decode = decode
        self._alone: dict[int, str] = {}  # by id; BROKEN for part of a character
        self._together: dict[tuple[int, ...], str] = {}

    def __call__(self, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
        """The texts of the tokens of one completion, (T,) ids."""
        tokens = np.asarray(ids, np.int64).tolist()
        for token in set(tokens):  # not less all that is known: that would look at every known one
            if token not in self._alone:
                self._alone[token] = self._text(token)
        texts = [self._alone[token] for token in tokens]
        return tuple(self._completed(tokens, texts) if BROKEN in texts else texts)

    def _text(self, token: int) -> str:
        once = self._decode([token])
        return BROKEN if BROKEN in once else self._decode([token, token])[len(once) :]

    def _completed(self, tokens: list[int], texts: list[str]) -> Iterator[str]:
        """``texts`` with the characters in place of BROKEN, run by run."""
        for text, run in groupby(zip(tokens, texts, strict=True), key=itemgetter(1)):
            ids = [token for token, _ in run]
            yield from self._characters(ids) if text == BROKEN else [text] * len(ids)

    def _characters(self, run: list[int]) -> Iterator[str]:
        """The texts of tokens that are all parts of characters: whole ones, and what is left between them."""
        stray: list[int] = []
        while run:
            size = self._whole(run)
            if size:
                yield from (*_first(self._decode, stray), *_first(self._joint, run[:size]))
                stray, run = [], run[size:]
            else:
                stray, run = [*stray, run[0]], run[1:]
        yield from _first(self._decode, stray)

    def _whole(self, run: list[int]) -> int:
        """How many tokens at the start of ``run`` make whole characters, 0 for none."""
        sizes = range(2, min(LONGEST, len(run)) + 1)
        return next((n for n in sizes if BROKEN not in self._joint(run[:n])), 0)

    def _joint(self, ids: list[int]) -> str:
        key = tuple(ids)
        if key not in self._together:
            self._together[key] = self._decode(ids)
        return self._together[key]


def _first(decode: Decode, ids: list[int]) -> list[str]:
    """The text of ``ids`` on the first of them."""
    return [decode(ids), *[""] * (len(ids) - 1)] if ids else []


def text_decode(tokenizer: Any) -> Decode:
    """The tokenizer's ``decode``, told to leave special tokens out if it takes that."""
    keywords = accepted_keywords(tokenizer.decode)
    skips = keywords is None or "skip_special_tokens" in keywords
    return partial(tokenizer.decode, skip_special_tokens=True) if skips else tokenizer.decode


def token_pieces(decode: Decode, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """The texts of the tokens of one completion, (T,) ids; for many completions keep one ``Pieces``."""
    return Pieces(decode)(ids)


def identify_planning_tokens(
    token_ids: Sequence[int] | np.ndarray,
    tokenizer: Any,
    strategic_grams: Sequence[str] | None = None,
    max_window: int = 5,
) -> list[int]:
    """1 for each token of one completion that is part of a strategic gram, 0 for the others.

    ``tokenizer`` needs decode(ids) -> text. None as ``strategic_grams`` means the default list.
    ``max_window`` has no effect: grams of any length are found. Raises UserError.
    """
    grams = PlanningGrams(DEFAULT_STRATEGIC_GRAMS if strategic_grams is None else strategic_grams)
    return planning_mask(token_pieces(text_decode(tokenizer), token_ids), grams).astype(int).tolist()
