"""Sharing prompts changes nothing, for every kind of cache that mlx-lm's models keep."""

import gc
import logging

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import ARCHITECTURES, PROMPTS, VOCABULARY, adapted, decoding_error
from conftest import recipe
from mlx.utils import tree_flatten

from textpolicy.errors import UserError
from textpolicy.losses import CrossEntropy, Surrogate, WithinDivergence, policy_objective
from textpolicy.mlx.decode.compiled_steps import Steps
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.mlx.kernels.plain import plain_operations
from textpolicy.mlx.read import prompts as prompts_module
from textpolicy.mlx.read.context import Attention, Context, Ragged, members
from textpolicy.mlx.read.prompts import PromptTree
from textpolicy.mlx.score.micro_batches import Layout, score
from textpolicy.types import Completion, Episode


def batch(prompts=PROMPTS):
    """Two completions of 1 to 9 tokens after every prompt."""
    rng = np.random.default_rng(2)
    episodes = []
    for i, prompt in enumerate([*prompts, *prompts]):
        n = 9 if i < len(prompts) else int(rng.integers(1, 9))
        c = Completion(
            rng.integers(1, VOCABULARY, n).astype(np.int32),
            rng.uniform(-5, -4, n).astype(np.float32),
            rng.uniform(0, 2, n).astype(np.float32),
        )
        episodes.append(Episode.from_completion(prompt, c, reward=float(rng.random()), group=i % len(prompts)))
    return recipe("grpo").credit(episodes)


def naive_loss_and_gradients(model, batch):
    """Every sequence read by itself from its first token on."""

    def loss(model):
        rows = []
        for inputs, targets, length in zip(batch.inputs, batch.targets, batch.lengths, strict=True):
            logits = model(mx.array(inputs[None, :length]))[0]
            picked = mx.take_along_axis(logits, mx.array(targets[:length, None]), axis=-1)[:, 0]
            rows.append(mx.pad(picked - mx.logsumexp(logits, axis=-1), (0, len(inputs) - length)))
        return policy_objective(mx.stack(rows), batch.map(mx.array), mx, Surrogate())

    return nn.value_and_grad(model, loss)(model)


@pytest.mark.parametrize("max_rows", [100, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoding_with_shared_prompts_gives_the_logprobs_of_each_sequence_alone(name, max_rows):
    assert decoding_error(adapted(name), max_rows) < 1e-4


@pytest.mark.parametrize("max_rows", [100, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled_steps_of_one_shape_give_the_logprobs_of_each_sequence_alone(name, max_rows):
    model = adapted(name)
    assert decoding_error(model, max_rows, Steps(model, compiled=True)) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_update_with_shared_prompts_has_the_naive_loss_and_every_gradient(name):
    model = adapted(name)
    rows = batch()
    loss, gradients = naive_loss_and_gradients(model, rows)
    objective = PolicyObjective(Surrogate())
    stats, ours = MLXEngine(model, stop=[0]).gradients(rows, objective)
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    exact = dict(tree_flatten(gradients))
    assert len(exact) >= 2 * len(model.layers)
    for key, value in tree_flatten(ours):
        scale = float(mx.abs(exact[key]).max()) or 1.0
        assert scale != 1.0 or ".indexer." in key  # which tokens attention reads is chosen, without a slope
        np.testing.assert_allclose(np.array(value) / scale, np.array(exact[key]) / scale, atol=2e-4, err_msg=key)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_that_are_computed_again_leave_every_gradient_as_it_was(name, every):
    model, rows = adapted(name), batch()
    objective = PolicyObjective(Surrogate())
    loss, kept = MLXEngine(model, stop=[0]).gradients(rows, objective)
    again, ours = MLXEngine(model, stop=[0], checkpoint_every=every).gradients(rows, objective)
    assert again["loss"] == pytest.approx(loss["loss"], rel=1e-5, abs=1e-6)
    exact = dict(tree_flatten(kept))
    for key, value in tree_flatten(ours):
        scale = float(mx.abs(exact[key]).max()) or 1.0
        assert scale != 1.0 or ".indexer." in key  # which tokens attention reads is chosen, without a slope
        np.testing.assert_allclose(np.array(value) / scale, np.array(exact[key]) / scale, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "falcon_h1"])
def test_checkpointing_keeps_fewer_activations(name):
    """With every block checkpointed, little but its input and keys waits for the backward pass."""
    waiting = {every: activations_waiting(adapted(name, num_hidden_layers=8), every) for every in (0, 1)}
    assert waiting[1] < 0.7 * waiting[0]


@plain_operations()
def activations_waiting(model, every):
    """Return the bytes held after the log-probs of a batch are computed and before their gradients are."""
    layout = Layout.build(batch())

    def loss(model):
        return score(model, layout, checkpoint_every=every).sum()

    gc.collect()
    before = mx.get_active_memory()
    value, gradients = nn.value_and_grad(model, loss)(model)
    mx.eval(value)
    waiting = mx.get_active_memory() - before
    del gradients
    return waiting


COMPILED = [
    *((prompts, Surrogate()) for prompts in (PROMPTS, [PROMPTS[2]], [[5 + i % 50 for i in range(64)]])),
    (PROMPTS, Surrogate(WithinDivergence("kl"), drift=0.1)),
    (PROMPTS, Surrogate(WithinDivergence("tv", symmetric=True))),
    (PROMPTS, Surrogate(CrossEntropy(), drift=1.0)),
]


@pytest.mark.parametrize(("prompts", "surrogate"), COMPILED)
def test_compiled_passes_have_the_gradients_of_eager_ones(prompts, surrogate):
    model, rows, objective = adapted("qwen3"), batch(prompts), PolicyObjective(surrogate)
    eager = dict(tree_flatten(MLXEngine(model, stop=[0]).gradients(rows, objective)[1]))
    engine = MLXEngine(model, stop=[0], compile=True)
    for _ in range(3):  # a shape is compiled when it comes for the second time
        compiled = dict(tree_flatten(engine.gradients(rows, objective)[1]))
    assert any(step is not None for step in engine._gradients.known.values())
    for key, value in eager.items():
        np.testing.assert_allclose(np.array(compiled[key]), np.array(value), atol=2e-5, err_msg=key)


def window_too_wide(monkeypatch):
    original = Context.mask
    monkeypatch.setattr(
        Context,
        "mask",
        lambda self, n, return_array, window, own=None: original(self, n, return_array, window and window + 1, own),
    )


def window_too_narrow(monkeypatch):
    original = Context.first_seen
    monkeypatch.setattr(Context, "first_seen", lambda self, own: min(self.size, original(self, own) + 1) if own else 0)


def mask_shifted(monkeypatch):
    original = Ragged.used_until

    def shifted(self, size):
        return mx.roll(original(self, size), 1, axis=1)

    monkeypatch.setattr(Ragged, "used_until", shifted)


def one_token_of_padding_counted(monkeypatch):
    original = Context.read

    def counted(self, model, tokens, lengths=None):
        return original(self, model, tokens, None if lengths is None else mx.minimum(lengths + 1, tokens.shape[1]))

    monkeypatch.setattr(Context, "read", counted)


@pytest.mark.parametrize("plant", [window_too_wide, window_too_narrow, mask_shifted, one_token_of_padding_counted])
def test_a_mask_that_is_off_by_one_shows_in_the_logprobs(plant, monkeypatch):
    model = adapted("gemma3")
    plant(monkeypatch)
    equal = plant is window_too_narrow  # only rows of equal length are cut to the window exactly
    assert decoding_error(model, prompts=[p[:6] for p in PROMPTS] if equal else PROMPTS) > 1e-3


def test_a_model_with_running_states_warns_once_that_it_reads_equal_lengths_together(caplog, monkeypatch):
    model = adapted("lfm2")
    monkeypatch.setattr(prompts_module, "_warned", set())
    prompts = [np.array(p, np.int32) for p in PROMPTS]
    with caplog.at_level(logging.WARNING):
        PromptTree.build([prompts[0], prompts[0]]).read(model)
        assert not caplog.messages
        PromptTree.build(prompts).read(model)
        PromptTree.build(prompts).read(model)
    [message] = caplog.messages
    assert message.startswith("the prompts of lfm2 are read in batches of equal length, because")
    assert "ArraysCache" in message


def test_padding_is_refused_where_it_would_change_a_running_state():
    model = adapted("falcon_h1")
    with pytest.raises(UserError, match=r"ArraysCache.* unequal length"):
        Context(model).read(model, mx.array([[5, 6], [7, 0]]), mx.array([2, 1]))


def test_a_running_state_that_has_not_begun_is_not_joined_with_one_that_has():
    model = adapted("lfm2")
    begun, fresh = Context(model), Context(model)
    begun.read(model, mx.array([[5, 6]]))
    with pytest.raises(UserError, match="have read too little to fill theirs"):
        Context.join([begun, fresh])


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1"])
def test_rows_that_join_later_and_rows_that_leave_change_nothing_for_the_others(name):
    model = adapted(name)
    rng = np.random.default_rng(4)
    texts = [rng.integers(3, VOCABULARY, n).tolist() for n in (17, 3, 8)]
    running = Context(model, spare=4)
    running.read(model, mx.array([texts[0]]))
    entered = [Context(model, spare=4), Context(model, spare=4)]
    for context, text in zip(entered, texts[1:], strict=True):
        context.read(model, mx.array([text]))
    joined = Context.join([running, *entered])
    assert (joined.rows, joined.size) == (3, 17)
    for rows in ([0, 1, 2], [2, 1], [0], [0, 0]):  # the long one leaves, then another; one row splits
        joined = joined.fork(np.array(rows))
        texts = [[*texts[row], int(token)] for row, token in zip(rows, rng.integers(3, VOCABULARY, 3), strict=False)]
        logits = np.array(joined.read(model, mx.array([text[-1:] for text in texts]))[:, -1])
        for ours, text in zip(logits, texts, strict=True):
            np.testing.assert_allclose(ours, np.array(model(mx.array([text]))[0, -1]), atol=1e-4)
    attention = next(layer for layer in members(joined.layers) if isinstance(layer, Attention))
    assert attention.offset == joined.size == len(texts[0])  # nothing is left of the long row's slots


def test_some_models_are_refused_although_their_caches_are_of_a_known_kind():
    model = adapted("llama")
    reasons = {
        "afm7": "position of a token",
        "gpt_bigcode": "one position for all rows",
        "minimax_m3_vl": "blocks of its cache",
        "olmo": "tokens see those that follow",
        "phi3small": "tokens see those that follow",
    }
    for name, reason in reasons.items():
        model.model_type = name
        with pytest.raises(UserError, match=f"{name} .*{reason}.*choose another model"):
            Context(model)
