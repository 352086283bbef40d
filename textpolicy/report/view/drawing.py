"""Draw a completion as coloured tokens: which value of a token is shown, and how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Colouring = Literal["credit", "advantage", "entropy", "surprisal", "ratio", "planning"]
COLOURINGS: dict[Colouring, str] = {
    "credit": "the advantage each token was trained with: blue raises it, orange lowers it",
    "advantage": "the completion's advantage in its group: blue above the baseline, orange below",
    "entropy": "how open the choice was, in nats",
    "surprisal": "how unlikely the token was, in nats",
    "ratio": "log of the learner's probability over the sampler's: blue likelier for the learner, orange less",
    "planning": "tokens of strategic grams",
}
LEVELS = 8  # of strength, in each direction
STRONGEST = {"entropy": 3.0, "surprisal": 6.0, "ratio": 0.5, "planning": 1.0}  # nats; others have the run's own scale


@dataclass(frozen=True, slots=True)
class Token:
    """The drawing of one token."""

    text: str
    style: str  # a CSS class: up1 to up8, down1 to down8, much1 to much8, reply, or empty
    title: str
    special: bool  # it has no text of its own


@dataclass(frozen=True, slots=True)
class Drawing:
    """The tokens of a completion, and the value that the strongest colour stands for."""

    tokens: Sequence[Token]
    strongest: float
    known: bool  # False where the run does not know the value


def draw(rows: Sequence[Mapping[str, Any]], by: Colouring, advantage: float) -> list[Drawing]:
    """Draw completions, rows of ``layout.schema``, coloured ``by`` one value on a scale that is fixed.

    ``advantage`` is the largest magnitude among the advantages of the run.
    """
    strongest = STRONGEST.get(by, advantage or 1.0)
    drawings: list[Drawing] = []
    for row in rows:
        figures, was_sampled = _values(row, by), row["sampled"] or [True] * len(row["tokens"])
        levels = np.zeros(len(row["tokens"]), int)
        if figures is not None:
            levels = np.rint(LEVELS * np.minimum(np.abs(np.nan_to_num(figures)), strongest) / strongest).astype(int)
        titles = {name: known for name in COLOURINGS if (known := _values(row, name)) is not None}
        tokens: list[Token] = []
        for i, (token, piece) in enumerate(zip(row["tokens"], row["pieces"], strict=True)):
            if not was_sampled[i]:
                style, title = "reply", f"token {token}, not the model's"
            else:
                one_sided = by in ("entropy", "surprisal", "planning")
                direction = "much" if one_sided else "up" if figures is not None and figures[i] > 0 else "down"
                style = f"{direction}{levels[i]}" if levels[i] else ""
                lines = [f"{name} {value[i]:.3g}" for name, value in titles.items()]
                title = "\n".join([f"token {token}, number {i + 1}", *lines])
            tokens.append(Token(piece or f"⟨{token}⟩", style, title, special=not piece))
        drawings.append(Drawing(tokens, strongest, figures is not None))
    return drawings


def _values(row: Mapping[str, Any], by: Colouring) -> np.ndarray | None:
    """Return the value of each token, (T,) float64; None where the run does not know it."""
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
