"""Lists of strategic grams, their files, and how often grams occur."""

import json

import numpy as np
import pytest

from textpolicy.algorithms.grams import (
    DEFAULT_STRATEGIC_GRAMS,
    cluster_document_frequency,
    document_frequency,
    extract_ngrams,
    frequency_by_cluster,
    get_countdown_strategic_grams,
    get_default_strategic_grams,
    gram_counts,
    load_strategic_grams,
    save_strategic_grams,
    top_clusters,
)
from textpolicy.errors import UserError

DOCS = ["Let me check: the outlet member", "let, me CHECK and let me check", "let men check", "Nothing."]


@pytest.mark.parametrize("get", [get_default_strategic_grams, get_countdown_strategic_grams])
def test_a_built_in_list_is_the_callers_own(get):
    grams = get()
    grams.clear()
    assert get()


def test_built_in_grams_are_lower_case_and_distinct():
    for grams in (list(DEFAULT_STRATEGIC_GRAMS), get_countdown_strategic_grams()):
        assert grams == [" ".join(gram.lower().split()) for gram in grams]
        assert len(set(grams)) == len(grams)


# files


@pytest.mark.parametrize("saved", [["let me", "that\u2019s"], {"grams": ["let me", "that\u2019s"], "note": "mine"}])
def test_saved_grams_are_loaded_unchanged(tmp_path, saved):
    path = tmp_path / "new" / "grams.json"
    save_strategic_grams(saved, path)
    assert load_strategic_grams(path) == ["let me", "that\u2019s"]
    assert load_strategic_grams(str(path)) == ["let me", "that\u2019s"]
    assert json.loads(path.read_text(encoding="utf-8")) == saved
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert load_strategic_grams(path) == ["let me", "that\u2019s"]


def test_a_tuple_is_saved_as_a_list(tmp_path):
    save_strategic_grams(DEFAULT_STRATEGIC_GRAMS, tmp_path / "grams.json")
    assert load_strategic_grams(tmp_path / "grams.json") == get_default_strategic_grams()


@pytest.mark.parametrize("content", ['"let me"', '{"gram": []}', "[1, 2]", '{"grams": "let me"}', "null", "{}"])
def test_a_file_of_another_form_is_named_in_the_error(tmp_path, content):
    path = tmp_path / "grams.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"the file .*grams\.json has no strategic grams; make it a list"):
        load_strategic_grams(path)


def test_a_file_that_is_absent_or_no_json_is_named_in_the_error(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json cannot be read"):
        load_strategic_grams(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("let me check")
    with pytest.raises(UserError, match=r"text\.json are not JSON"):
        load_strategic_grams(tmp_path / "text.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(UserError, match=r"bytes\.json are not JSON"):
        load_strategic_grams(tmp_path / "bytes.json")


def test_grams_that_could_not_be_loaded_are_not_saved(tmp_path):
    for wrong in ({"phrases": ["let me"]}, [1], {"grams": None}):
        with pytest.raises(UserError, match="has no strategic grams"):
            save_strategic_grams(wrong, tmp_path / "grams.json")
    assert not (tmp_path / "grams.json").exists()


# counting


def test_ngrams_come_shortest_first_then_in_order_with_repeats():
    assert extract_ngrams("A b. A\tb.", 1, 3) == ["a", "b.", "a", "b.", "a b.", "b. a", "a b.", "a b. a", "b. a b."]
    assert extract_ngrams("one two three four five six") == [
        "one two three", "two three four", "three four five", "four five six",
        "one two three four", "two three four five", "three four five six",
        "one two three four five", "two three four five six",
    ]  # fmt: skip


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2, 1), (-1, 3)])
def test_impossible_ngram_lengths_are_refused(low, high):
    with pytest.raises(UserError, match=f"min_n is {low} and max_n is {high}"):
        extract_ngrams("a b c", low, high)


def test_grams_are_counted_as_whole_words_and_as_often_as_they_occur():
    assert gram_counts(["let me check", "the outlet", "let"], DOCS).tolist() == [
        [1, 2, 0, 0],
        [1, 0, 0, 0],
        [1, 2, 1, 0],
    ]
    assert gram_counts([], DOCS).shape == (0, 4)
    assert gram_counts(["a"], []).shape == (1, 0)


def test_a_document_counts_once_however_often_it_holds_a_gram():
    assert document_frequency(["let me check", "member", "mem", ""], DOCS) == {
        "let me check": 0.5, "member": 0.25, "mem": 0.0, "": 0.0,
    }  # fmt: skip
    assert document_frequency(["let me"], []) == {"let me": 0.0}
    assert document_frequency([], DOCS) == {}


def test_a_cluster_occurs_in_a_document_when_any_of_its_grams_does():
    labels = {"the outlet": 7, "nothing": 7, "let men": 2, "absent": 9}
    assert cluster_document_frequency(labels, DOCS) == {2: 0.25, 7: 0.5, 9: 0.0}
    assert cluster_document_frequency({}, DOCS) == {}
    assert cluster_document_frequency(labels, []) == {2: 0.0, 7: 0.0, 9: 0.0}


def test_cluster_frequencies_are_those_of_a_slow_count():
    rng = np.random.default_rng(0)
    found, labels = rng.random((30, 40)) < 0.05, rng.integers(0, 6, 30)
    slow = {}
    for cluster in sorted(set(labels.tolist())):
        docs = [d for d in range(40) if any(found[k, d] for k in range(30) if labels[k] == cluster)]
        slow[cluster] = len(docs) / 40
    assert frequency_by_cluster(found, labels) == pytest.approx(slow)


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [(0.01, [4]), (0.2, [4]), (0.4, [4, 0]), (0.6, [4, 0, 3]), (0.79, [4, 0, 3]), (1.0, [4, 0, 3, 1, 2])],
)
def test_the_top_clusters_are_the_most_frequent_ties_by_lower_number(fraction, kept):
    assert top_clusters({3: 0.5, 0: 0.5, 1: 0.1, 2: 0.0, 4: 0.9}, fraction) == kept


def test_no_clusters_give_no_grams_and_an_impossible_fraction_is_refused():
    assert top_clusters({}) == []
    for fraction in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="top_fraction is"):
            top_clusters({0: 1.0}, fraction)
