"""Templates escape, and show as codes the characters that nobody can see."""

import pytest

from textpolicy.report.rendering import visible


@pytest.mark.parametrize(
    "character",
    [
        "\u202e", "\u202a", "\u2066", "\u2069", "\u200e", "\u200f", "\u061c",  # turn the direction
        "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u034f", "\u180e", "\ufe0f",  # have no width
        "\u115f", "\u3164", "\uffa0", "\u2800",  # blanks that are letters
        "\0", "\x07", "\x1b", "\r", "\x0b", "\x0c", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\ufff9",
        "\U000e0041", "\U000e0101", "\U0001d173",
    ],
)  # fmt: skip
def test_a_character_that_cannot_be_seen_is_shown_as_its_code(character):
    assert visible(f"left{character}right") == f"left⟨U+{ord(character):04X}⟩right"


@pytest.mark.parametrize(
    "text",
    ["", "plain\n\ttext", "naïve — “so”", "שלום", "مرحبا", "日本語　空白", "👍🏽", "\u0600 12", "a\u0301", "\xa0"],
)
def test_text_that_is_seen_stays_as_it_is(text):
    assert visible(text) == text
