"""Planning masks (HICRA, arXiv:2509.03646): which sampled tokens are part of a strategic gram."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError

# U+0130 is the only character whose lower case is longer than itself
_ONE_FOR_ONE = (("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u0130", "i"))


@dataclass(frozen=True, slots=True)
class PlanningGrams:
    """Strategic grams, compiled once for any number of texts; blank ones are ignored.

    A gram w1 w2 ... matches where its words stand in this order with nothing but non-word characters
    between them, in any case, with straight or curly quotes, and never inside a longer word.
    Raises UserError when ``phrases`` is a single string.
    """

    phrases: Sequence[str]
    _grams: tuple[_Gram, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.phrases, str):
            raise UserError(f"the strategic grams are the string {self.phrases!r}; give a list of strings")
        words = [tuple(_plain(phrase).split()) for phrase in self.phrases]
        object.__setattr__(self, "phrases", tuple(self.phrases))
        object.__setattr__(self, "_grams", tuple(_Gram.of(w) for w in dict.fromkeys(words) if w))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the grams match, as (start, end) in characters of ``text``: overlaps included, gram by gram."""
        text = _plain(text)
        return [span for gram in self._grams if gram.could_be_in(text) for span in gram.spans(text)]


@dataclass(frozen=True, slots=True)
class _Gram:
    words: tuple[str, ...]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, words: tuple[str, ...]) -> _Gram:
        return cls(words, re.compile(r"\W+".join(map(re.escape, words)) + r"(?!\w)"))

    def could_be_in(self, text: str) -> bool:
        """Whether every word is somewhere in ``text``, be it inside another: much faster than the pattern."""
        return all(word in text for word in self.words)

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        # a leading (?<!\w) in the pattern would keep `re` from its fast search for the first word
        match = self.pattern.search(text)
        while match:
            start = match.start()
            if start == 0 or not _in_word(text[start - 1]):
                yield match.span()
            match = self.pattern.search(text, start + 1)  # not after its end: a gram may overlap itself


def planning_mask(pieces: Sequence[str], grams: PlanningGrams) -> np.ndarray:
    """(T,) bool: the tokens of one completion that share a character with a match of any gram.

    ``pieces`` are the decoded texts of its T tokens, spaces included; an empty one (a special token) is never
    marked. A match begins and ends with a word, so the spaces that begin a token need no trimming.
    """
    mask = np.zeros(len(pieces), bool)
    spans = grams.spans("".join(pieces))
    if not spans:
        return mask
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))  # (T,) characters
    ends = np.cumsum(lengths)
    start, end = np.array(spans).T
    first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends - lengths, end, "left")
    for i, j in zip(first.tolist(), last.tolist(), strict=True):
        mask[i:j] = True
    return mask & (lengths > 0)


def planning_masks(completions: Sequence[Sequence[str]], grams: PlanningGrams) -> np.ndarray:
    """(N,) bool: ``planning_mask`` of completion after completion; no gram matches across two of them."""
    return np.concatenate([np.zeros(0, bool), *(planning_mask(pieces, grams) for pieces in completions)])


def _plain(text: str) -> str:
    """Lower case and straight quotes, every character where it was."""
    for character, plain in _ONE_FOR_ONE:
        text = text.replace(character, plain)
    return text.lower()


def _in_word(character: str) -> bool:
    """What ``re`` calls \\w."""
    return character.isalnum() or character == "_"
