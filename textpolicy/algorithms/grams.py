"""The strategic grams of HICRA (arXiv:2509.03646): built-in lists, files of grams, and their frequency in texts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..types import Bools, Ints
from .planning import PlanningGrams

DEFAULT_STRATEGIC_GRAMS = (
    "wait let me", "let me think", "on second thought",
    "let me check", "let me verify", "is this right", "double check",
    "try another approach", "go back and", "start over", "that's not right", "that doesn't work",
    "another way to", "or we could", "what if we",
    "notice that", "the key is", "the key insight",
)  # fmt: skip

COUNTDOWN_STRATEGIC_GRAMS = (
    "let me try", "let me check", "i need to", "we need to",
    "using the numbers", "use each number", "each number once",
    "closest to", "too high", "too low",
    "difference is", "sum is", "product is", "divide by", "multiply by",
    "try another", "another way",
    "that gives", "which gives", "so we get",
    "line 1", "line 2", "final expression", "answer is",
)  # fmt: skip


def get_default_strategic_grams() -> list[str]:
    """Return the default grams, for mathematical reasoning, as a new list."""
    return list(DEFAULT_STRATEGIC_GRAMS)


def get_countdown_strategic_grams() -> list[str]:
    """Return grams for the task of reaching a target from given numbers, as a new list."""
    return list(COUNTDOWN_STRATEGIC_GRAMS)


# ---- files


def load_strategic_grams(path: str | Path) -> list[str]:
    """Read the grams of a JSON file, a list of strings or ``{"grams": [...]}``. Raises UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"the strategic grams {path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the strategic grams {path} are not JSON ({error}); fix the file") from error
    return _listed(content, f"the file {path}")


def save_strategic_grams(grams: Sequence[str] | Mapping[str, Any], path: str | Path) -> None:
    """Write a file for ``load_strategic_grams`` from a list, or a mapping that has one under "grams".

    Other entries of a mapping are kept. Missing folders are created. Raises UserError.
    """
    content = dict(grams) if isinstance(grams, Mapping) else list(grams)
    _listed(content, f"the value to be saved as {path}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _listed(content: Any, where: str) -> list[str]:
    """Return the grams of parsed JSON. Raises UserError."""
    grams = content.get("grams") if isinstance(content, dict) else content
    if not isinstance(grams, list) or not all(isinstance(gram, str) for gram in grams):
        raise UserError(f'{where} has no strategic grams; make it a list of strings, or {{"grams": [...]}}')
    return grams


# ---- counting


def extract_ngrams(text: str, min_n: int = 3, max_n: int = 5) -> list[str]:
    """Return the n-grams of min_n to max_n words of ``text`` in lower case, shortest first, then in order.

    Words are separated by whitespace; repeated n-grams are kept. Raises UserError unless 1 <= min_n <= max_n.
    """
    if not 1 <= min_n <= max_n:
        raise UserError(f"min_n is {min_n} and max_n is {max_n}; set 1 <= min_n <= max_n")
    words = text.lower().split()
    return [" ".join(words[i : i + n]) for n in range(min_n, max_n + 1) for i in range(len(words) - n + 1)]


def gram_counts(grams: Sequence[str], docs: Sequence[str]) -> Ints:
    """Count each of K grams in each of D texts, (K, D) int64, by the matching rules of planning masks."""
    finders = [PlanningGrams((gram,)) for gram in grams]
    counts = [[len(finder.spans(doc)) for doc in docs] for finder in finders]
    return np.array(counts, np.int64).reshape(len(grams), len(docs))


def document_frequency(grams: Sequence[str], docs: Sequence[str]) -> dict[str, float]:
    """Return DF(g), the share of the texts that contain gram g; 0 without texts."""
    found = gram_counts(grams, docs) > 0
    return dict(zip(grams, (found.sum(axis=-1) / max(len(docs), 1)).tolist(), strict=True))


def cluster_document_frequency(labels: Mapping[str, int], docs: Sequence[str]) -> dict[int, float]:
    """Return CDF(C), the share of the texts that contain any gram of cluster C (arXiv:2509.03646); 0 without texts.

    ``labels`` is the cluster of each gram. Clusters are in ascending order.
    """
    found = gram_counts(list(labels), docs) > 0
    return frequency_by_cluster(found, np.array(list(labels.values()), np.int64))


def frequency_by_cluster(found: Bools, labels: Ints) -> dict[int, float]:
    """Return CDF(C) from (K, D) bool, which gram is in which text, and (K,) the cluster of each gram."""
    texts = max(found.shape[1], 1)
    return {int(c): float(found[labels == c].any(axis=0).sum() / texts) for c in np.unique(labels)}


def top_clusters(frequency: Mapping[int, float], top_fraction: float = 0.2) -> list[int]:
    """Return the floor(top_fraction n), but at least one, most frequent of n clusters; ties go to lower numbers.

    ``frequency`` is CDF(C) by cluster. Raises UserError unless 0 < top_fraction <= 1.
    """
    if not 0 < top_fraction <= 1:
        raise UserError(f"top_fraction is {top_fraction}; set it above 0 and to at most 1")
    ranked = sorted(frequency, key=lambda c: (-frequency[c], c))
    return ranked[: max(1, math.floor(top_fraction * len(ranked)))]
