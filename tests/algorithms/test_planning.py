"""Which tokens are planning: the grams, where they match, and which tokens a match covers."""

import random
import re
import sys
import time

import numpy as np
import pytest

from textpolicy.algorithms.grams import DEFAULT_STRATEGIC_GRAMS
from textpolicy.algorithms.planning import PlanningGrams, planning_mask, planning_masks
from textpolicy.errors import UserError

DEFAULT = PlanningGrams(DEFAULT_STRATEGIC_GRAMS)


def marked(pieces, *phrases):
    """The pieces under the mask, in brackets where they are marked."""
    mask = planning_mask(pieces, PlanningGrams(phrases) if phrases else DEFAULT)
    return "".join(f"[{piece}]" if m else piece for piece, m in zip(pieces, mask, strict=True))


def slow_mask(pieces, phrases):
    """A mask by trying each gram at every character, and each character of every token."""
    text = "".join(pieces)
    inside = [False] * len(text)
    for phrase in phrases:
        pattern = re.compile(r"(?<!\w)" + r"\W+".join(map(re.escape, phrase.split())) + r"(?!\w)", re.IGNORECASE)
        for start in range(len(text)):
            match = phrase.strip() and pattern.match(text, start)
            if match:
                inside[match.start() : match.end()] = [True] * len(match.group())
    mask, at = [], 0
    for piece in pieces:
        begin, at = at + len(piece) - len(piece.lstrip()) if piece.strip() else at, at + len(piece)
        mask.append(any(inside[begin:at]))
    return mask


# matching


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["so", " let", " me", " check", "."], "so[ let][ me][ check]."),
        (["LET", " Me", " cHeCk"], "[LET][ Me][ cHeCk]"),
        (["let me", " think it"], "[let me][ think it]"),
        (["let", "\n\n", "me", "  ", " check", "\n"], "[let][\n\n][me][  ][ check]\n"),
        (["let", ",", " me", "...", "check"], "[let][,][ me][...][check]"),
        (["double", "-", "check"], "[double][-][check]"),
        (["that", "\u2019", "s", " not", " right"], "[that][\u2019][s][ not][ right]"),
        (["\u201c", "start", " over", "\u201d"], "\u201c[start][ over]\u201d"),
        ([" out", "let me", " check"], " outlet me check"),
        (["let", " me", " check", "ing"], "let me checking"),
        (["_let", " me", " check"], "_let me check"),
        (["let", " me", " check", "2"], "let me check2"),
    ],
)
def test_a_gram_matches_whole_words_in_any_case_whatever_stands_between(pieces, shown):
    assert marked(pieces) == shown


def test_letters_whose_lower_case_is_longer_shift_nothing():
    pieces = ["\u0130\u0130\u0130", " let", " me", " check", " \u0130"]
    assert marked(pieces) == "\u0130\u0130\u0130[ let][ me][ check] \u0130"


def test_no_other_letter_changes_its_length_in_lower_case():
    longer = [c for c in map(chr, range(sys.maxunicode + 1)) if len(c.lower()) != 1]
    assert longer == ["\u0130"]


def test_matches_may_overlap_each_other_and_themselves():
    assert marked(["on", " and", " on", " and", " on", " and"], "on and on") == "[on][ and][ on][ and][ on] and"
    assert marked([" wait", " let", " me", " think"], "wait let me", "let me think") == "[ wait][ let][ me][ think]"


def test_a_gram_found_inside_a_word_is_still_found_after_it():
    assert marked(["outlet", " me check", " let me check"], "let me check") == "outlet me check[ let me check]"


def test_special_characters_in_a_gram_stand_for_themselves():
    assert marked(["a+b", " (or", " aab"], "a+b") == "[a+b] (or aab"
    assert marked(["f(", "x", ") is"], "f( x") == "f(x) is"
    assert marked(["f(", " x", ") is"], "f( x") == "[f(][ x]) is"


def test_blank_grams_match_nothing_and_repeats_count_once():
    grams = PlanningGrams(["", "  ", "\n", "Let  me", "let me"])
    assert grams.spans("let me") == [(0, 6)]
    assert not planning_mask([" ", "a", ""], PlanningGrams(["", " "])).any()


def test_one_string_is_refused_where_a_list_is_meant():
    with pytest.raises(UserError, match="are the string 'let me check'; give a list"):
        PlanningGrams("let me check")


def test_spans_are_places_in_the_text_as_it_was_given():
    text = "\u0130 That\u2019s  NOT right"
    [(start, end)] = PlanningGrams(["that's not right"]).spans(text)
    assert text[start:end] == "That\u2019s  NOT right"


def test_grams_are_equal_by_their_phrases_and_cannot_be_changed():
    assert PlanningGrams(["a b"]) == PlanningGrams(("a b",))
    with pytest.raises(AttributeError):
        DEFAULT.phrases = ()


# masks


def test_empty_pieces_are_never_marked():
    mask = planning_mask(["", " let", "", " me", " check", ""], DEFAULT)
    assert mask.dtype == bool
    assert mask.tolist() == [False, True, False, True, True, False]


def test_tokens_that_only_touch_a_match_are_not_marked():
    assert marked([" ", "let", " me", " check", " ", "it"]) == " [let][ me][ check] it"


def test_without_tokens_or_grams_nothing_is_marked():
    assert planning_mask([], DEFAULT).shape == (0,)
    assert planning_mask(["", ""], DEFAULT).tolist() == [False, False]
    assert planning_mask(["let me check"], PlanningGrams([])).tolist() == [False]


def test_a_batch_of_masks_is_flat_and_nothing_matches_across_completions():
    completions = [["let", " me"], [], [" check", " let", " me", " check"]]
    masks = planning_masks(completions, DEFAULT)
    assert masks.tolist() == [False, False, False, True, True, True]
    assert planning_masks([], DEFAULT).shape == (0,)
    assert planning_masks([], DEFAULT).dtype == bool


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_is_that_of_a_slow_search_on_made_up_text(seed):
    rng = random.Random(seed)
    alphabet = ["a", "b", "ab", "B", " ", "  ", "\n", ", ", "'", "-", "", "1", "\u00e9", " a", " b", "a b"]
    pieces = rng.choices(alphabet, k=200)
    phrases = ["a b", "b a b", "ab", "a a", "b'a", "1 a", "\u00e9 b", " "]
    assert planning_mask(pieces, PlanningGrams(phrases)).tolist() == slow_mask(pieces, phrases)


def test_a_completion_of_2048_tokens_takes_less_than_5_milliseconds():
    rng = random.Random(0)
    words = sorted({*" ".join(DEFAULT_STRATEGIC_GRAMS).split(), "sum", "of", "outlet"})
    pieces = [" " + word for word in rng.choices(words, k=2048)]
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        mask = planning_mask(pieces, DEFAULT)
        seconds.append(time.perf_counter() - started)
    assert mask.any()
    assert min(seconds) < 0.005


def test_the_mask_takes_any_sequence_of_strings():
    pieces = np.array([" let", " me", " check", " it"], dtype=object)
    assert planning_mask(pieces, DEFAULT).tolist() == [True, True, True, False]
