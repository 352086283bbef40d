"""The drafts of tokens that follow, from what was said before: a pass over a draft is several steps of decoding.

A draft token is accepted if it is the token that the row draws with its own random number at that place, so drafts
change no completion, whatever they are (but for the rounding of passes of another size). When they are tried depends on
the texts alone, and not on the clock, so a run is repeated bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

ROWS = 2  # completions that are left: with 4 on two cores, unequal lengths and longer passes cost what drafts save
_MOST = 8  # tokens of a draft
_SUFFIXES = (4, 3, 2)  # tokens that must have been said before, the longest first
_COST = 0.05  # of one more token of a row, in passes of one token (SmolLM2-135M on two cores: 0.03 to 0.05)
_BELIEF = (0.2, 4.0)  # guesses that were right, and all, before the first
_FADES = 0.98  # what a guess weighs after the next
_ENTRIES = 2**20  # of the index


class Drafts:
    """The texts of some completions, with an index of what followed every few tokens, for each prompt."""

    def __init__(self, prompts: Sequence[np.ndarray], tokens: Sequence[np.ndarray], rows: Collection[int]) -> None:
        """Index the ``tokens`` that followed the prompts of ``rows`` so far, and judge the guesses of each of them.

        What the other completions of those prompts have said comes first.
        """
        places: dict[bytes, int] = {}
        self._prompt = [places.setdefault(prompt.tobytes(), len(places)) for prompt in prompts]
        self._texts: list[list[int]] = [[] for _ in prompts]
        self._after: dict[tuple[int, ...], tuple[int, int]] = {}  # prompt and tokens -> text, place of what followed
        self._right, self._all = (dict.fromkeys(_SUFFIXES, count) for count in _BELIEF)  # guesses, by suffix
        self._guessed: dict[int, tuple[int, int]] = {}  # row -> suffix, and the token that is expected next
        new = {self._prompt[row] for row in rows}
        of_these = [row for row, prompt in enumerate(self._prompt) if prompt in new]
        for row in sorted(of_these, key=lambda row: row in rows):
            text = self._texts[row] = prompts[row].tolist()
            if self._prompt[row] in new:
                new.remove(self._prompt[row])
                for place in range(len(text)):
                    self._note(row, place)
            for token in tokens[row].tolist():
                self._draft(row)
                self.add(row, token)

    def add(self, row: int, token: int) -> None:
        """Add a ``token`` to the text of completion ``row``; the first after a draft tells what its guess was worth."""
        if (guess := self._guessed.pop(row, None)) is not None:
            suffix, expected = guess
            self._right[suffix] = _FADES * self._right[suffix] + (token == expected)
            self._all[suffix] = _FADES * self._all[suffix] + 1
        self._texts[row].append(token)
        self._note(row, len(self._texts[row]) - 1)

    def of(self, rows: Sequence[int]) -> list[list[int]]:
        """Return a draft for each of the completions ``rows``, of no more tokens than pay.

        A guess that is right with probability p makes a draft's first k tokens right with about p^k. A column of a
        pass costs R tokens and saves its share of a pass for each of R rows, so it pays while the sum of p^k over the
        rows whose drafts reach it is above R^2 times the cost of a token.
        """
        drafts, chances = list[list[int]](), list[float]()
        for row in rows:
            suffix, draft = self._draft(row)
            drafts.append(draft)
            chances.append(self._right[suffix] / self._all[suffix] if draft else 0.0)
        width = 0
        while width < _MOST:
            reaching = [p for p, draft in zip(chances, drafts, strict=True) if len(draft) > width]
            if sum(p ** (width + 1) for p in reaching) <= _COST * len(rows) ** 2:
                break
            width += 1
        return [draft[:width] for draft in drafts]

    def _note(self, row: int, place: int) -> None:
        """Record that the token at ``place`` followed those before it."""
        text, prompt = self._texts[row], self._prompt[row]
        if len(self._after) < _ENTRIES:
            for n in _SUFFIXES:
                if place >= n:
                    self._after[prompt, *text[place - n : place]] = (row, place)

    def _draft(self, row: int) -> tuple[int, list[int]]:
        """Return the longest suffix of a text that was said before, in tokens, and what followed it."""
        text, prompt = self._texts[row], self._prompt[row]
        for n in _SUFFIXES:
            if (found := self._after.get((prompt, *text[-n:]))) is not None:
                other, place = found
                self._guessed[row] = n, self._texts[other][place]
                return n, self._texts[other][place : place + _MOST]
        return 0, []
