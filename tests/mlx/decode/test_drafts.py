"""Drafts change no completion, whatever they are, and take fewer passes where texts repeat."""

import numpy as np
import pytest
from families import mx, tiny_family

from textpolicy.engine import Sampling
from textpolicy.mlx.decode import decoder as module
from textpolicy.mlx.decode import drafts as drafts_module
from textpolicy.mlx.decode.decoder import decode
from textpolicy.mlx.decode.drafts import Drafts

STOP = np.array([7, 21], np.int32)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Drafts for more rows, and believed from the first guess on, so that more of them are tried."""
    monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(drafts_module, "_BELIEF", (1.0, 4.0))


def run(model, prompts, sampling, drafts, stop=STOP):
    """The completions, and the passes that they took."""
    made = []
    true = module._Decoder.run

    def counted(self):
        made.append(self)
        return true(self)

    module._Decoder.run = counted
    try:
        return decode(model, prompts, sampling, stop, 100, drafts=drafts), made[0].passes
    finally:
        module._Decoder.run = true


def same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-4)
        assert a.truncated == b.truncated


class Round:
    """The model with a liking for what follows each token in a circle of 20, so that its texts repeat."""

    def __init__(self, model, by):
        self.model = model
        table = np.zeros((60, 60), np.float32)
        table[np.arange(60), (np.arange(60) + 1) % 20 + 22] = by
        self.table = mx.array(table)

    def __call__(self, tokens, cache=None):
        return self.model(tokens, cache=cache) + self.table[tokens]

    def __getattr__(self, name):
        return getattr(self.model, name)


PROMPTS = [np.array(p, np.int32) for p in ([5, 6, 8, 9], [5, 6, 8, 9], [11, 12], [5, 6, 8, 9, 10])]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "olmo2", "qwen3_moe"])
@pytest.mark.parametrize("sharp", [0, 8])
def test_the_last_rows_draw_what_they_draw_without_drafts(family, sharp):
    model = Round(tiny_family(family), sharp)
    for seed in range(3):
        sampling = Sampling(max_tokens=60, seed=seed)
        expected, plain = run(model, PROMPTS, sampling, False)
        found, passes = run(model, PROMPTS, sampling, True)
        same(found, expected)
        assert passes <= plain


@pytest.mark.cpu
def test_repeating_texts_take_fewer_passes():
    model = Round(tiny_family("llama"), 8)
    plain = drafted = 0
    for seed in range(4):
        sampling = Sampling(max_tokens=120, seed=seed)
        plain += run(model, PROMPTS, sampling, False, stop=np.array([], np.int32))[1]
        drafted += run(model, PROMPTS, sampling, True, stop=np.array([], np.int32))[1]
    assert plain > 1.4 * drafted


@pytest.mark.parametrize("greedy", [False, True])
def test_hostile_drafts_change_nothing(monkeypatch, greedy):
    model = tiny_family("llama")
    draw = np.random.default_rng(0)
    sampling = Sampling(max_tokens=40, seed=1, temperature=0.0 if greedy else 1.0)
    expected, _ = run(model, PROMPTS, sampling, False)
    stops = [7, 21]
    for kind in (lambda n: draw.integers(0, 60, n).tolist(), lambda n: [stops[0]] * n, lambda n: [0] * n):
        monkeypatch.setattr(Drafts, "of", lambda self, rows, kind=kind: [kind(int(draw.integers(0, 9))) for _ in rows])
        same(run(model, PROMPTS, sampling, True)[0], expected)


@pytest.mark.cpu
def test_drafts_that_are_right_are_taken_whole(monkeypatch):
    model = tiny_family("llama")
    sampling = Sampling(max_tokens=40, seed=2)
    expected, plain = run(model, PROMPTS, sampling, False, stop=np.array([], np.int32))
    true = [c.tokens.tolist() for c in expected]
    begins = [len(p) for p in PROMPTS]

    def oracle(self, rows):
        return [true[row][len(self._texts[row]) - begins[row] :][:7] for row in rows]

    monkeypatch.setattr(Drafts, "of", oracle)
    found, passes = run(model, PROMPTS, sampling, True, stop=np.array([], np.int32))
    same(found, expected)
    assert passes < plain / 4


def test_gaps_between_slots_are_packed_and_nothing_changes(monkeypatch):
    packed = []
    true = module.Context.packed

    def noted(self, lengths):
        packed.append(self.size)
        return true(self, lengths)

    monkeypatch.setattr(module.Context, "packed", noted)
    monkeypatch.setattr(module, "_GAP", 3)
    model = Round(tiny_family("gemma3_text"), 6)
    for seed in range(3):
        sampling = Sampling(max_tokens=80, seed=seed)
        expected, _ = run(model, PROMPTS, sampling, False, stop=np.array([], np.int32))
        same(run(model, PROMPTS, sampling, True, stop=np.array([], np.int32))[0], expected)
    assert packed


def test_running_states_and_many_rows_have_no_drafts(monkeypatch):
    monkeypatch.setattr(Drafts, "__init__", lambda *_: pytest.fail("drafts are made"))
    run(tiny_family("mamba2"), [PROMPTS[0]] * 2, Sampling(max_tokens=8), True)
    run(tiny_family("llama"), [PROMPTS[0]] * 9, Sampling(max_tokens=8), True, stop=np.array([], np.int32))


def test_a_draft_continues_the_longest_suffix_of_the_same_prompt():
    one, other = np.array([1, 2], np.int32), np.array([3, 4], np.int32)
    drafts = Drafts([one, one, other], [np.array(t) for t in ([5, 6, 7, 8, 9], [5, 6, 7], [8, 5, 6, 7])], {1, 2})
    assert drafts.of([1]) == [[8, 9]]  # of a sibling
    assert drafts.of([2]) == [[]]  # 5 6 7 was said, after another prompt
    drafts.add(1, 8)
    assert drafts.of([1]) == [[9]]
    drafts.add(1, 1)
    drafts.add(1, 2)
    [draft] = drafts.of([1])
    assert draft[:2] == [5, 6]  # what followed 1 2 last: its own text


@pytest.mark.parametrize("alike", [True, False])
def test_what_was_said_before_tells_what_guesses_are_worth(alike):
    """Siblings that say the same make the first draft a long one, others none or one token."""
    rng = np.random.default_rng(0)
    said = np.arange(10, 40)
    texts = [said if alike else rng.integers(10, 22, 120) for _ in range(9)]
    drafts = Drafts([np.array([1, 2], np.int32)] * 9, [*texts[:8], texts[8][:12]], {8})
    [draft] = drafts.of([8])
    assert draft == said[12:20].tolist() if alike else len(draft) < 2


def test_texts_of_other_prompts_are_not_read():
    prompts = [np.array(p, np.int32) for p in ([1, 2], [3, 4], [1, 2])]
    drafts = Drafts(prompts, [np.arange(5), np.arange(5), np.arange(2)], {2})
    assert drafts._texts == [[1, 2, 0, 1, 2, 3, 4], [], [1, 2, 0, 1]]


def test_drafts_grow_while_they_are_right_and_end_while_they_are_wrong():
    def tried(rows, rightly):
        """The lengths of 200 drafts for each of so many rows, of texts that go round."""
        drafts = Drafts([np.tile(np.arange(10, dtype=np.int32), 2)] * rows, [np.arange(0)] * rows, range(rows))
        draw, lengths = np.random.default_rng(0), []
        for _ in range(200):
            drafted = drafts.of(range(rows))
            lengths.append(len(drafted[0]))
            for row in range(rows):
                last = drafts._texts[row][-1]
                drafts.add(row, (last + 1) % 10 if draw.random() < rightly else int(draw.integers(10)))
        return lengths

    assert tried(1, 1.0)[-1] == tried(8, 1.0)[-1] == 8
    assert max(tried(8, 0.1)[20:]) == 0
    assert np.mean(tried(4, 0.1)[40:]) < 0.1
    assert 0 < np.mean(tried(4, 0.7)[40:]) < 8
    assert np.mean(tried(8, 0.7)[40:]) < np.mean(tried(2, 0.7)[40:])
