"""Strategic grams (HICRA, arXiv:2509.03646): the built-in lists, their files, and how often grams occur in texts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
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
    """The grams of a run that names none, for mathematical reasoning: a list of your own."""
    return list(DEFAULT_STRATEGIC_GRAMS)


def get_countdown_strategic_grams() -> list[str]:
    """Grams for the task of reaching a target from given numbers: a list of your own."""
    return list(COUNTDOWN_STRATEGIC_GRAMS)


# ---- files


def load_strategic_grams(path: str | Path) -> list[str]:
    """The grams of a JSON file, a list of strings or ``{"grams": [...]}``. Raises UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the strategic grams {path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the strategic grams {path} are not JSON ({error}); mend the file") from error
    return _listed(content, f"the file {path}")


def save_strategic_grams(grams: Sequence[str] | Mapping[str, Any], path: str | Path) -> None:
    """Write what ``load_strategic_grams`` reads: a list, or a mapping that holds one under "grams".

    Other entries of a mapping are kept. Folders on the way are made. Raises UserError.
    """
    content = dict(grams) if isinstance(grams, Mapping) else list(grams)
    _listed(content, f"what is to be saved as {path}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _listed(content: Any, where: str) -> list[str]:
    grams = content.get("grams") if isinstance(content, dict) else content
    if not isinstance(grams, list) or not all(isinstance(gram, str) for gram in grams):
        raise UserError(f'{where} holds no strategic grams; make it a list of strings, or {{"grams": [...]}}')
    return grams


# ---- counting


def extract_ngrams(text: str, min_n: int = 3, max_n: int = 5) -> list[str]:
    """The n-grams of min_n to max_n words of ``text`` in lower case: shortest first, then in order, repeats kept.

    Words are what whitespace separates. Raises UserError unless 1 <= min_n <= max_n.
    """
    if not 1 <= min_n <= max_n:
        raise UserError(f"min_n is {min_n} and max_n is {max_n}; set 1 <= min_n <= max_n")
    words = text.lower().split()
    return [" ".join(words[i : i + n]) for n in range(min_n, max_n + 1) for i in range(len(words) - n + 1)]


def gram_counts(grams: Sequence[str], docs: Sequence[str]) -> np.ndarray:
    """(K, D) int64: how often each of K grams occurs in each of D texts, found as planning masks find it."""
    finders = [PlanningGrams((gram,)) for gram in grams]
    counts = [[len(finder.spans(doc)) for doc in docs] for finder in finders]
    return np.array(counts, np.int64).reshape(len(grams), len(docs))


def document_frequency(grams: Sequence[str], docs: Sequence[str]) -> dict[str, float]:
    """DF(g) = share of the texts that contain gram g, 0 where there are no texts."""
    return dict(zip(grams, _share(gram_counts(grams, docs) > 0).tolist(), strict=True))


def cluster_document_frequency(labels: Mapping[str, int], docs: Sequence[str]) -> dict[int, float]:
    """CDF(C) = share of the texts that contain any gram of cluster C (arXiv:2509.03646); 0 without texts.

    ``labels`` gives the cluster of each gram. The clusters come in ascending order.
    """
    found = gram_counts(list(labels), docs) > 0
    return frequency_by_cluster(found, np.array(list(labels.values()), np.int64))


def frequency_by_cluster(found: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """CDF(C) from (K, D) bool, which gram is in which text, and (K,) the cluster of each gram."""
    return {int(c): float(_share(found[labels == c].any(axis=0))) for c in np.unique(labels)}


def top_clusters(frequency: Mapping[int, float], top_fraction: float = 0.2) -> list[int]:
    """The floor(top_fraction n), but at least one, of n clusters that occur most often; ties go to lower numbers.

    ``frequency`` gives CDF(C) by cluster. Raises UserError unless 0 < top_fraction <= 1.
    """
    if not 0 < top_fraction <= 1:
        raise UserError(f"top_fraction is {top_fraction}; set it above 0 and to at most 1")
    ranked = sorted(frequency, key=lambda c: (-frequency[c], c))
    return ranked[: max(1, math.floor(top_fraction * len(ranked)))]


def _share(found: np.ndarray) -> np.ndarray:
    """(..., D) bool -> (...) float64, the mean over texts, 0 of none."""
    return found.sum(axis=-1) / max(found.shape[-1], 1)
