"""Mark the sampled tokens that are part of a strategic gram: the planning masks of HICRA (arXiv:2509.03646)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError
from ..types import Bools

# U+0130 is the only character whose lower case is longer than itself
_ONE_FOR_ONE = (("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u0130", "i"))


@dataclass(frozen=True, slots=True)
class PlanningGrams:
    """The strategic grams, compiled once for any number of texts; blank ones are ignored.

    A gram w1 w2 ... matches where its words occur in this order with only non-word characters between
    them, in any case, with straight or curly quotes, and never inside a longer word.
    Raises UserError when ``phrases`` is a single string.
    """

    phrases: Sequence[str]
    _grams: dict[tuple[str, ...], re.Pattern[str]] = field(init=False, repr=False, compare=False)  # words -> pattern

    def __post_init__(self) -> None:
        if isinstance(self.phrases, str):
            raise UserError(f"the strategic grams are the string {self.phrases!r}; give a list of strings")
        grams = [tuple(_plain(phrase).split()) for phrase in self.phrases]
        compiled = {words: re.compile(r"\W+".join(map(re.escape, words)) + r"(?!\w)") for words in grams if words}
        object.__setattr__(self, "phrases", tuple(self.phrases))
        object.__setattr__(self, "_grams", compiled)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the matches as (start, end) in characters of ``text``, overlaps included, gram by gram."""
        text = _plain(text)
        found = []
        for words, pattern in self._grams.items():
            if not all(word in text for word in words):  # much faster than the pattern
                continue
            # a leading (?<!\w) in the pattern would disable the fast search of `re` for the first word
            match = pattern.search(text)
            while match:
                start = match.start()
                if start == 0 or not (text[start - 1].isalnum() or text[start - 1] == "_"):  # what `re` calls \w
                    found.append(match.span())
                match = pattern.search(text, start + 1)  # not after its end: a gram may overlap itself
        return found


def planning_mask(pieces: Sequence[str], grams: PlanningGrams) -> Bools:
    """Mark the tokens of one completion that share a character with a match of any gram, (T,) bool.

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


def planning_masks(completions: Sequence[Sequence[str]], grams: PlanningGrams) -> Bools:
    """Return ``planning_mask`` of completion after completion, (N,) bool; no gram matches across two of them."""
    return np.concatenate([np.zeros(0, bool), *(planning_mask(pieces, grams) for pieces in completions)])


def _plain(text: str) -> str:
    """Return ``text`` in lower case with straight quotes, and every character at the same index."""
    for character, plain in _ONE_FOR_ONE:
        text = text.replace(character, plain)
    return text.lower()
