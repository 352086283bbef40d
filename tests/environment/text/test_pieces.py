"""The text of single tokens, from decode alone: of byte-level, sentence-piece and dummy tokenizers."""

import random
import time
from collections import Counter

import numpy as np
import pytest

from textpolicy.environment.text.pieces import Pieces, identify_planning_tokens, text_decode
from textpolicy.errors import UserError


class Vocabulary:
    """Tokens of bytes, decoded together; ids below 0 are special. Counts its calls."""

    def __init__(self, *tokens):
        self.tokens = [t if isinstance(t, bytes) else t.encode() for t in tokens]
        self.calls = Counter()

    def decode(self, ids, skip_special_tokens=False):
        self.calls[tuple(ids)] += 1
        parts = [self.tokens[i] if i >= 0 else b"" if skip_special_tokens else b"<end>" for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")


class SentencePiece(Vocabulary):
    """As SentencePiece: the space that begins a text is not part of it."""

    def decode(self, ids, skip_special_tokens=False):
        return super().decode(ids, skip_special_tokens).removeprefix(" ")


def pieces(vocabulary, ids):
    return Pieces(text_decode(vocabulary))(ids)


# any tokenizer


@pytest.mark.parametrize("kind", [Vocabulary, SentencePiece])
def test_a_space_in_front_stays_with_its_token(kind):
    vocabulary = kind(" let", " me", " ", "   ", "ing", "\n", " \n", "\u00e9")
    assert pieces(vocabulary, range(8)) == (" let", " me", " ", "   ", "ing", "\n", " \n", "\u00e9")


def test_a_decoder_that_puts_spaces_between_tokens_gives_each_its_own():
    words = ["let", "me", "check"]
    assert Pieces(lambda ids: " ".join(words[i] for i in ids))([0, 1, 2]) == (" let", " me", " check")


def test_special_tokens_are_empty_where_decode_can_leave_them_out():
    assert pieces(Vocabulary("a"), [0, -1, 0, -1]) == ("a", "", "a", "")
    vocabulary = Vocabulary("a")
    assert Pieces(vocabulary.decode)([0, -1]) == ("a", "<end>")


def test_a_tokenizer_that_takes_ids_only_gets_no_other_argument():
    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    assert pieces(Letters(), [104, 105, 32]) == ("h", "i", " ")


def test_a_completion_without_tokens_has_no_pieces():
    assert pieces(Vocabulary(), []) == ()
    assert pieces(Vocabulary(), np.zeros(0, np.int32)) == ()


def test_ids_may_be_an_array_of_any_integer_type():
    assert pieces(Vocabulary("a", "b"), np.array([1, 0, 1], np.uint16)) == ("b", "a", "b")


# characters in parts

EMOJI = "\U0001f600".encode()


def test_a_character_of_several_tokens_is_the_text_of_the_first():
    vocabulary = Vocabulary("a", EMOJI[:1], EMOJI[1:2], EMOJI[2:], " z")
    assert pieces(vocabulary, [0, 1, 2, 3, 4, 1, 2, 3]) == ("a", "\U0001f600", "", "", " z", "\U0001f600", "", "")


def test_tokens_that_hold_parts_of_two_characters_are_read_together():
    vocabulary = Vocabulary(b"x" + EMOJI[:2], EMOJI[2:] + EMOJI[:1], EMOJI[1:] + b"y", "z")
    assert pieces(vocabulary, [0, 1, 2, 3]) == ("x\U0001f600\U0001f600y", "", "", "z")


def test_consecutive_characters_are_separated():
    vocabulary = Vocabulary("\u4e2d".encode()[:2], "\u4e2d".encode()[2:], "\u56fd".encode()[:1], "\u56fd".encode()[1:])
    assert pieces(vocabulary, [0, 1, 2, 3, 0, 1]) == ("\u4e2d", "", "\u56fd", "", "\u4e2d", "")


def test_bytes_that_make_no_character_are_kept_as_the_decoder_shows_them():
    vocabulary = Vocabulary(EMOJI[:1], EMOJI[1:2], EMOJI[2:], "a", "\ufffd")
    for ids in ([0, 1], [0, 3], [2, 0, 1, 2, 3], [0, 0, 1, 2], [4, 0, 1, 2], [3, 0, 1]):
        assert "".join(pieces(vocabulary, ids)) == vocabulary.decode(ids)
    assert pieces(vocabulary, [0, 1, 3]) == ("\ufffd", "", "a")


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_random_bytes_join_to_the_decoded_text(seed):
    rng = random.Random(seed)
    letters = "a b\u00e9\u4e2d\U0001f600\U0001f1e9\u200d".encode()
    vocabulary = Vocabulary(*(letters[i : i + n] for i in range(len(letters)) for n in (1, 2, 3)))
    ids = rng.choices(range(len(vocabulary.tokens)), k=60)
    assert "".join(pieces(vocabulary, ids)) == vocabulary.decode(ids)


# the cache


def test_every_token_is_decoded_once_however_often_it_comes():
    vocabulary = Vocabulary("a", " b", EMOJI[:2], EMOJI[2:])
    read = Pieces(vocabulary.decode)
    first = read([0, 1, 2, 3, 0, 1])
    calls = sum(vocabulary.calls.values())
    assert read([0, 1, 2, 3, 0, 1]) == first
    assert read([2, 3, 0]) == ("\U0001f600", "", "a")
    assert sum(vocabulary.calls.values()) == calls


def test_a_step_of_262144_known_tokens_takes_well_below_a_second():
    rng = np.random.default_rng(0)
    read = Pieces(Vocabulary(*(f" {i}" for i in range(5000))).decode)
    completions = rng.integers(0, 5000, (256, 1024))
    read(np.arange(5000))
    started = time.perf_counter()
    lengths = [len(read(ids)) for ids in completions]
    assert time.perf_counter() - started < 0.5
    assert sum(lengths) == 262144


# the built-in tokenizer

TEXTS = [
    "Let me check: 12 + 30 = 42. That\u2019s not right, so I'll start over!",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694",
    "emoji \U0001f600\U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f1ef\U0001f1f5 .",
    "lines\n\n\n\twith   runs    of  spaces \r\n  \n end ",
    "caf\u00e9 na\u00efve \u0130stanbul \u2211 x\u00b2 \u2264 \u221e \u2014 \u00abquoted\u00bb",
    " begins with a space",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_smollm_join_to_the_text(smollm, text):
    tokenizer = smollm[1]
    ids = tokenizer.encode(text)
    texts = pieces(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text == tokenizer.decode(ids)


def test_pieces_of_smollm_join_to_the_text_however_tokens_follow_each_other(smollm):
    tokenizer = smollm[1]
    ids = np.random.default_rng(0).integers(0, 49152, 3000).tolist()
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_of_smollm_are_empty_and_words_keep_their_space(smollm):
    tokenizer = smollm[1]
    ids = [*tokenizer.encode("Let me check"), tokenizer.eos_token_id]
    assert pieces(tokenizer, ids) == ("Let", " me", " check", "")


# planning tokens


def test_planning_tokens_of_smollm_are_those_of_the_phrase(smollm):
    tokenizer = smollm[1]
    ids = tokenizer.encode("Sum is 4. Wait, that doesn\u2019t work; 5")
    marked = identify_planning_tokens(ids, tokenizer)
    assert set(marked) == {0, 1}
    inside = [i for i, m in zip(ids, marked, strict=True) if m]
    assert tokenizer.decode(inside) == " that doesn\u2019t work"


def test_planning_tokens_are_found_by_any_list_of_grams_and_whatever_the_window():
    vocabulary = Vocabulary(" one", " two", " three", " four", " five", " six", " seven")
    assert identify_planning_tokens(range(7), vocabulary) == [0] * 7
    assert identify_planning_tokens(range(7), vocabulary, []) == [0] * 7
    grams = ["two three four five six seven"]
    assert identify_planning_tokens(range(7), vocabulary, grams, max_window=2) == [0, 1, 1, 1, 1, 1, 1]
    with pytest.raises(UserError, match="give a list"):
        identify_planning_tokens(range(7), vocabulary, "two three")
