"""A completion as coloured tokens: which figure of a token is shown, and how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Colouring = Literal["credit", "advantage", "entropy", "surprisal", "ratio", "planning"]
COLOURINGS: dict[Colouring, str] = {
    "credit": "what each token was trained with: blue raises it, orange lowers it",
    "advantage": "the completion's advantage in its group: blue above the baseline, orange below",
    "entropy": "how open the choice was, in nats",
    "surprisal": "how unlikely the token was, in nats",
    "ratio": "log of the learner's probability over the sampler's: blue likelier for the learner, orange less",
    "planning": "tokens of strategic grams",
}
LEVELS = 8  # of strength, in each direction


@dataclass(frozen=True, slots=True)
class Token:
    """One token as the page draws it."""

    text: str
    style: str  # a CSS class: up1 to up8, down1 to down8, much1 to much8, reply, or none
    title: str
    special: bool  # it has no text of its own


@dataclass(frozen=True, slots=True)
class Drawing:
    """The tokens of a completion, and the value that the strongest colour stands for."""

    tokens: Sequence[Token]
    strongest: float
    known: bool  # False where the run does not know this figure


def draw_together(rows: Sequence[Mapping[str, Any]], by: Colouring) -> list[Drawing]:
    """Several completions on one scale."""
    return [draw(row, by, max(strongest_of(row, by) for row in rows)) for row in rows]


def strongest_of(row: Mapping[str, Any], by: Colouring) -> float:
    """The largest magnitude of a sampled token's figure; 0 where it is not known."""
    values, sampled = _values(row, by), _sampled(row)
    return 0.0 if values is None else float(np.abs(values[sampled]).max(initial=0.0))


def draw(row: Mapping[str, Any], by: Colouring, strongest: float | None = None) -> Drawing:
    """A completion of ``layout.schema``, coloured ``by`` a figure; ``strongest`` is its own largest if not given."""
    values, sampled = _values(row, by), _sampled(row)
    strongest = strongest_of(row, by) if strongest is None else strongest
    styles = _styles(values, strongest, by, len(row["tokens"]))
    figures = {name: _values(row, name) for name in COLOURINGS}
    tokens = [
        Token(
            text=piece or f"⟨{token}⟩",
            style=style if was_sampled else "reply",
            title=_title(i, token, figures) if was_sampled else f"token {token}, not the model's",
            special=not piece,
        )
        for i, (token, piece, style, was_sampled) in enumerate(
            zip(row["tokens"], row["pieces"], styles, sampled, strict=True)
        )
    ]
    return Drawing(tokens, strongest, values is not None)


def _sampled(row: Mapping[str, Any]) -> np.ndarray:
    return np.array(row["sampled"] or [True] * len(row["tokens"]), bool)


def _values(row: Mapping[str, Any], by: Colouring) -> np.ndarray | None:
    """(T,) float64, None where it is not known."""
    match by:
        case "advantage":
            return None if row["advantage"] is None else np.full(len(row["tokens"]), row["advantage"], float)
        case "surprisal":
            return -np.array(row["logprobs"], float)
        case "ratio":
            learner = row["learner_logprobs"]
            return None if learner is None else np.array(learner, float) - np.array(row["logprobs"], float)
        case "credit" | "entropy" | "planning":
            return None if row[by] is None else np.array(row[by], float)


def _styles(values: np.ndarray | None, strongest: float, by: Colouring, count: int) -> list[str]:
    """The CSS class of each token."""
    if values is None or strongest == 0:
        return [""] * count
    one_sided = by in ("entropy", "surprisal", "planning")
    levels = np.ceil(LEVELS * np.abs(values) / strongest).astype(int)
    names = ["much" if one_sided else "up" if value > 0 else "down" for value in values]
    return [f"{name}{min(level, LEVELS)}" if level else "" for name, level in zip(names, levels.tolist(), strict=True)]


def _title(i: int, token: int, figures: Mapping[Colouring, np.ndarray | None]) -> str:
    known = [f"{name} {values[i]:.3g}" for name, values in figures.items() if values is not None]
    return "\n".join([f"token {token}, number {i + 1}", *known])
