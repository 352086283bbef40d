"""A served model: prompts read in one prefill, models loaded side by side, and what memory has room for."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import arrays, log_softmax, made, tenant, tiny_base

from textpolicy.engine import Sampling
from textpolicy.errors import UserError
from textpolicy.mlx.adapters.merging import attach
from textpolicy.mlx.memory import Costs
from textpolicy.mlx.tenants import room as rooms
from textpolicy.mlx.tenants.model import Base
from textpolicy.mlx.tenants.shared import lora, twin
from textpolicy.serving import Adam, Adapter, Request
from textpolicy.tinker.server.tiny_model import write_tiny_model


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_prompt_is_read_as_a_whole_pass_over_it_does(chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr("textpolicy.mlx.tenants.reading.tokens_at_once", lambda _: chunk)
    base, rng = tiny_base(), np.random.default_rng(1)
    weights, prompt = tenant(base).weights(), rng.integers(1, 300, 9)
    exact = np.array(log_softmax(weights.model, prompt[:-1]))  # row i is of token i + 1
    targets = rng.integers(0, 300, (8, 3))
    targets[2, 1] = targets[5] = -1
    read = base.read(weights, prompt, top=4, targets=targets)
    assert np.isnan(read.logprobs[0])
    np.testing.assert_allclose(read.logprobs[1:], exact[np.arange(8), prompt[1:]], atol=1e-5)
    order = np.argsort(-exact, axis=1)[:, :4]
    assert np.array_equal(read.alternatives.tokens[1:], order)
    np.testing.assert_allclose(read.alternatives.logprobs[1:], np.take_along_axis(exact, order, 1), atol=1e-5)
    assert (read.alternatives.tokens[0] == 0).all()
    assert (read.alternatives.logprobs[0] == -99999).all()
    asked = np.where(targets < 0, 0, np.take_along_axis(exact, np.maximum(targets, 0), 1))
    np.testing.assert_allclose(read.targets, asked, atol=1e-5)
    late = base.read(weights, prompt, top=4, targets=targets, last=np.arange(9) >= 6)
    np.testing.assert_allclose(late.targets, asked, atol=1e-5)
    assert np.isnan(late.logprobs[:6]).all()
    np.testing.assert_allclose(late.logprobs[6:], read.logprobs[6:], atol=1e-6)
    assert np.array_equal(late.alternatives.tokens[6:], read.alternatives.tokens[6:])
    assert (late.alternatives.logprobs[:6] == -99999).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_in_the_place_of_a_prompts_are_drawn_by_their_probabilities(temperature):
    base = tiny_base()
    weights, prompt, k = tenant(base).weights(), np.array([5, 9, 7, 7]), 4000
    sampling = Sampling(temperature=temperature, top_k=2, seed=3)
    drawn = base.read(weights, prompt, draws=k, sampling=sampling, last=np.arange(4) >= 3).drawn
    exact = np.array(log_softmax(weights.model, prompt[:-1]), np.float64)
    np.testing.assert_allclose(drawn.logprobs, np.take_along_axis(exact, drawn.tokens, 1), atol=1e-5)
    likely = np.exp(exact / temperature)
    likely /= likely.sum(axis=1, keepdims=True)
    counts = np.array([np.bincount(line, minlength=300) for line in drawn.tokens])
    away = (counts - k * likely) ** 2 / (k * likely)
    often = k * likely >= 5
    n = often.sum(axis=1)
    assert (n >= 5).all()
    assert ((away * often).sum(axis=1) < n + 5 * np.sqrt(2 * n)).all()  # chi squared
    again = base.read(weights, prompt, draws=2, sampling=sampling).drawn
    assert again.tokens.shape == (3, 2)


def test_a_prompt_of_one_token_has_no_log_probs():
    read = tiny_base().read(tiny_base().base, np.array([5]), top=400)
    assert np.isnan(read.logprobs).tolist() == [True]
    assert read.alternatives.tokens.shape == (1, 300)


@pytest.mark.parametrize(
    ("prompt", "targets", "said"),
    [([], None, "empty"), ([300], None, "300"), ([1] * 257, None, "257"), ([1, 2], [[300]], "300"), ([1, 2], [1], "K")],
)
def test_a_prompt_that_cannot_be_read_is_refused(prompt, targets, said):
    base = tiny_base()
    with pytest.raises(UserError, match=said):
        base.read(base.base, np.array(prompt, int), targets=None if targets is None else np.array(targets))


def test_models_of_two_folders_are_served_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "limit_memory", lambda _: mx.get_active_memory() + 2e9)
    served, prompt = [], np.arange(1, 9)
    for seed in (0, 1):
        write_tiny_model(tmp_path / f"{seed}", seed)
        served.append(Base.load(str(tmp_path / f"{seed}")))
    for model, seed in zip(served, (0, 1), strict=True):
        assert (model.vocabulary, model.context, model.stop) == (264, 4096, frozenset([257]))
        assert model.tokenizer_folder == tmp_path / f"{seed}"
        learner = model.learner(Adapter(rank=2))
        before = model.read(model.base, prompt).logprobs
        learner.passed(
            [made(np.random.default_rng(0), 0, [5, 6, 7], cross_entropy=True)], "cross_entropy", {}, backward=False
        )
        learner.step(Adam())
        assert np.array_equal(model.read(model.base, prompt).logprobs, before, equal_nan=True)
    a, b = (model.read(model.base, prompt).logprobs[1:] for model in served)
    assert not np.allclose(a, b)


def with_room(spare):
    """A tiny base of which memory has room for ``spare`` bytes beside what is in it."""
    base = tiny_base()
    model = twin(base.model)
    costs = Costs.measure(attach(model, lora(model, Adapter(rank=4))))
    del model
    room = rooms.Room(costs, mx.get_active_memory() + spare)
    return Base("tiny", base.model, base.tokenizer, context=256, room=room), room


def test_what_has_no_room_in_memory_is_refused_before_it_is_tried():
    base, _ = with_room(1e3)
    request = Request(base.base, np.array([5]), 1, Sampling(200), frozenset())
    with pytest.raises(UserError, match="no room"):
        base.decoding().admit("a", request)
    with pytest.raises(UserError, match="lower its rank"):
        base.learner(Adapter(rank=64))
    base, room = with_room(1e8)
    learner = base.learner(Adapter(rank=4))
    object.__setattr__(room, "budget", mx.get_active_memory() + 1e3)
    with pytest.raises(UserError, match="a datum of 5 tokens"):
        learner.passed([made(np.random.default_rng(0), 5)], "ppo", {}, backward=True)
    assert learner.gradient is None


def test_less_memory_makes_passes_and_batches_smaller_and_changes_no_result():
    wide, _ = with_room(4e9)
    narrow, room = with_room(4e9)
    row = room.costs.update(rooms.Workload(40, 1, 1, 9), 9) - room.costs.weights
    rng = np.random.default_rng(3)
    data = [made(rng, 8) for _ in range(40)]
    learners = [base.learner(Adapter(rank=4)) for base in (wide, narrow)]
    object.__setattr__(room, "budget", mx.get_active_memory() + 1.3 * row)
    assert 9 <= room.pass_tokens(40, 9, 8192) < 8192
    a, b = (learner.passed(data, "ppo", {}, backward=True) for learner in learners)
    assert a.metrics["loss:sum"] == pytest.approx(b.metrics["loss:sum"], rel=1e-5)
    requests = [Request(base.base, np.array([5, 6]), 8, Sampling(6, seed=1), frozenset()) for base in (wide, narrow)]
    one = 2 * 8 * room.costs.cache + room.costs.logits
    object.__setattr__(room, "budget", mx.get_active_memory() + 3 * one + 1.1 * room.costs.reading(2, 4))
    assert 1 <= room.places([(2, 6)] * 8, []) < 8
    found = []
    for base, request in zip((wide, narrow), requests, strict=True):
        batch, out = base.decoding(), {}
        batch.admit("a", request)
        while len(batch):
            out |= batch.step()
        found.append([s.completion.tokens.tolist() for s in out["a"]])
    assert found[0] == found[1]
    assert arrays(learners[0])
