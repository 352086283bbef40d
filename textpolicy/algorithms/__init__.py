"""One file per idea; this table says how they combine."""

from __future__ import annotations

from ..errors import unknown_name
from ..losses import Surrogate
from .credit import Algorithm as Algorithm
from .credit import Credit as Credit
from .grpo import center, standardize

ALGORITHMS = {
    "grpo": Algorithm(standardize, normalize="sequence", paper="arXiv:2402.03300"),
    "dr_grpo": Algorithm(center, normalize="constant", paper="arXiv:2503.20783"),
    "gspo": Algorithm(
        standardize,
        surrogate=Surrogate("sequence", clip_low=3e-4, clip_high=4e-4),
        normalize="sequence",
        paper="arXiv:2507.18071",
    ),
}


def algorithm(name: str) -> Algorithm:
    """The recipe called ``name``; an unknown name is a ``UserError`` that lists the known ones."""
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]
