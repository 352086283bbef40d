"""Compiled decoding steps of one shape give the completions of the plain loop, whatever happens to their rows."""

import gc
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapter_kinds import ADAPTERS
from adapter_kinds import adapted as adapter_of_kind
from architectures import adapted, decoding_error
from conftest import tiny_llama
from families import tiny_family
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache
from test_decoder import PROMPTS, STOP
from test_decoder import assert_same as assert_close

from textpolicy.engine import Sampling
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.decode import compiled_steps
from textpolicy.mlx.decode.compiled_steps import Steps
from textpolicy.mlx.decode.decoder import decode
from textpolicy.mlx.kernels import operations
from textpolicy.mlx.kernels.fused_linear import View
from textpolicy.mlx.read import sizes
from textpolicy.mlx.read.prompts import PromptTree

LONG = [prompt for prompt in PROMPTS if len(prompt) > 1]  # a prompt of one token leaves nothing to continue


def assert_same(ours, expected):
    assert_close(ours, expected, atol=1e-4)  # other products round otherwise; the plain loop is as far from float64


def device(**changes):
    """What stands for the kernels of a device: MLX's operations, called as a device's kernels are."""

    def add_lora(y, b, widths):
        return operations.add_lora(y, operations.spread(mx.split(b, np.cumsum(widths)[:-1].tolist(), axis=1)), widths)

    ours = {"HEAD_SIZES": (), "add_lora": add_lora, "can_attend": lambda *arrays: False, "is_default": lambda: True}
    return SimpleNamespace(**{**vars(operations), **ours, **changes})


def both(model, sampling, max_rows, **settings):
    """Return the completions of compiled steps, and those of the plain loop."""
    steps = Steps(model, **{"compiled": True, **settings})
    ours = decode(model, LONG, sampling, STOP, max_rows, steps=steps)
    return ours, decode(model, LONG, sampling, STOP, 100)


@pytest.mark.parametrize("recent", [0, 3, 32])
@pytest.mark.parametrize("max_rows", [1, 3, 7, 100])
def test_rows_that_enter_or_leave_change_no_completion(tiny_engine, max_rows, recent, monkeypatch):
    monkeypatch.setattr(compiled_steps, "_RECENT", recent)
    kernels = operations if recent else device()
    ours, expected = both(tiny_engine.model, Sampling(max_tokens=24, seed=3), max_rows, kernels=kernels)
    lengths = [len(c.tokens) for c in expected]
    assert min(lengths) < max(lengths)
    assert_same(ours, expected)


@pytest.mark.timeout(60)
def test_many_rows_that_end_one_by_one_all_end(tiny_engine):
    """Of 48 rows 35 are too few to go on as they are, and are as many as 48 once they are rounded up."""
    prompts, stop, sampling = LONG[:1] * 48, np.arange(6), Sampling(max_tokens=120, seed=3)
    ours = decode(tiny_engine.model, prompts, sampling, stop, 100, steps=Steps(tiny_engine.model, compiled=True))
    expected = decode(tiny_engine.model, prompts, sampling, stop, 100)
    running = {sum(len(c.tokens) > step for c in expected) for step in range(120)}
    assert running & {33, 34, 35}
    assert_same(ours, expected)


@pytest.mark.parametrize("recent", [0, 1, 4, 16])
def test_rows_outgrow_their_slots(tiny_engine, recent, monkeypatch):
    monkeypatch.setattr(compiled_steps, "_RECENT", recent)
    monkeypatch.setattr(sizes, "_ROOM", 8)
    sampling = Sampling(max_tokens=40, seed=5)
    steps = Steps(tiny_engine.model, compiled=True, kernels=operations if recent else device())
    ours = decode(tiny_engine.model, LONG, sampling, np.array([0]), 5, steps=steps)
    assert max(len(c.tokens) for c in ours) == 40
    assert_same(ours, decode(tiny_engine.model, LONG, sampling, np.array([0]), 100))


def test_computing_ahead_changes_no_completion(tiny_engine):
    steps = Steps(tiny_engine.model, compiled=True)
    sampling = Sampling(max_tokens=24, seed=9)
    ours = decode(tiny_engine.model, LONG, sampling, STOP, 5, ahead=True, steps=steps)
    assert_same(ours, decode(tiny_engine.model, LONG, sampling, STOP, 100))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.8}, {"repetition_penalty": 3.0}])
def test_every_sampling_setting_gives_the_completions_of_the_plain_loop(tiny_engine, settings):
    assert_same(*both(tiny_engine.model, Sampling(max_tokens=12, seed=2, **settings), 5))


def test_prompts_of_one_token_use_the_plain_loop(tiny_engine):
    steps = Steps(tiny_engine.model, compiled=True)
    sampling = Sampling(max_tokens=12, seed=3)
    ours = decode(tiny_engine.model, PROMPTS, sampling, STOP, 5, steps=steps)
    assert_same(ours, decode(tiny_engine.model, PROMPTS, sampling, STOP, 100))


def test_a_step_of_training_is_seen_by_functions_compiled_before_it(tiny_engine):
    model, sampling = tiny_engine.model, Sampling(max_tokens=12, seed=3)
    steps = Steps(model, compiled=True)
    before = decode(model, LONG, sampling, STOP, 100, steps=steps)
    compiled = len(steps.known)
    for layer in model.modules():
        if "lora_b" in layer:
            layer.lora_b = layer.lora_b + 0.3 * mx.random.normal(layer.lora_b.shape)
    after = decode(model, LONG, sampling, STOP, 100, steps=steps)
    assert len(steps.known) == compiled
    assert_same(after, decode(model, LONG, sampling, STOP, 100))
    assert any(
        len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any() for a, b in zip(before, after, strict=True)
    )


def test_fully_trained_weights_are_read_again(tiny_engine):
    model, sampling = tiny_engine.model, Sampling(max_tokens=12, seed=3)
    model.unfreeze()
    steps = Steps(model, compiled=True)
    decode(model, LONG, sampling, STOP, 100, steps=steps)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = layer.weight + 0.1 * mx.random.normal(layer.weight.shape)
    assert_same(decode(model, LONG, sampling, STOP, 100, steps=steps), decode(model, LONG, sampling, STOP, 100))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_gives_the_completions_of_the_plain_loop(kind):
    assert_same(*both(adapter_of_kind(kind), Sampling(max_tokens=12, seed=3), 5))


def test_a_model_that_leaves_a_running_state_unused_takes_the_plain_loop(monkeypatch):
    model = adapted("lfm2")
    caches = [KVCache if layer.is_attention_layer else lambda: ArraysCache(size=2) for layer in model.layers]
    monkeypatch.setattr(type(model), "make_cache", lambda self: [make() for make in caches])
    assert decoding_error(model, 4, Steps(model, compiled=True)) < 1e-4


def test_layers_of_a_quantised_base_are_fused():
    model = adapted("llama", hidden_size=64, intermediate_size=128)
    nn.quantize(model, group_size=32, bits=8, class_predicate=lambda path, _: path.endswith(".linear"))
    steps = Steps(model, compiled=True)
    assert any(len(group.layers) == 3 for group in steps.view.groups)
    assert decoding_error(model, 4, steps) < 1e-4


def test_fused_layers_keep_their_weights_and_store_nothing_twice():
    model = adapted("qwen3")
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    held = mx.get_active_memory()
    view = View.of(model)
    mx.synchronize()  # a GPU lets go of what it has used when it is done
    grown = mx.get_active_memory() - held
    assert sorted(len(group.layers) for group in view.groups) == [1, 1, 1, 1, 2, 2, 3, 3]
    for name, value in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(np.array(value), before[name], err_msg=name)
    assert grown < 0.1 * sum(value.nbytes for value in before.values())


def test_weights_that_are_joined_anew_are_in_memory_once_but_for_a_block():
    model = attach_lora(tiny_llama(60, layers=12), rank=2)
    weights = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    steps = Steps(model, compiled=False)
    for _ in range(2):  # the second time the weights are those that the first has joined
        mx.reset_peak_memory()
        steps.refresh()
        assert mx.get_peak_memory() - mx.get_active_memory() < 0.2 * weights


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_slot_too_many_seen_shows_in_the_logprobs(name, monkeypatch):
    original = compiled_steps._Slots.make_mask

    def shifted(self, *arguments, **keywords):
        return mx.roll(original(self, *arguments, **keywords), 1, axis=-1)

    monkeypatch.setattr(compiled_steps._Slots, "make_mask", shifted)
    model = adapted(name)
    assert decoding_error(model, 4, Steps(model, compiled=False)) > 1e-3


def test_prompts_whose_completions_have_ended_are_let_go(tiny_engine):
    steps = Steps(tiny_engine.model, compiled=False)
    steps.refresh()
    prompts = [np.arange(1, n + 2) for n in range(1, 9) for _ in range(3)]
    rows = steps.begin(PromptTree.build(prompts), np.arange(24))
    assert rows.prompts == 8
    kept = np.array([4, 18, 20])
    fewer = rows.only(kept)
    assert fewer.prompts == 2
    uniform = mx.full((24,), 0.3)
    whole, _ = steps(rows, uniform, Sampling(8))
    part, _ = steps(fewer, uniform[:3], Sampling(8))
    np.testing.assert_array_equal(np.array(part.tokens), np.array(whole.tokens)[kept])
    np.testing.assert_allclose(np.array(part.logprobs), np.array(whole.logprobs)[kept], atol=1e-5)


def test_kernels_that_leave_the_attention_to_mlx_share_prompts_in_any_way():
    """Rows of a prompt lie in order at first, and no more when others have joined."""
    model = adapted("llama")
    prompts = [LONG[0], LONG[0], *LONG, LONG[0], LONG[1], LONG[1]]
    sampling, stop = Sampling(12, seed=3), np.arange(0, 60, 4)
    steps = Steps(model, compiled=False, kernels=device())
    expected = decode(model, prompts, sampling, stop, 4, ahead=False)
    assert_same(decode(model, prompts, sampling, stop, 4, ahead=False, steps=steps), expected)


class TestKernelsOfTheDevice:
    """Kernels are taken where they serve every layer and draw what MLX's operations draw."""

    @pytest.fixture
    def ours(self, monkeypatch):
        """The kernels of a device, which draw ``off`` nats beside what they should."""
        ours, original = device(off=0.0, in_place=True), Steps._tried

        def tried(steps, forced=None):
            drawn, _ = original(steps, forced)
            off = ours.off if steps.kernels is ours else 0.0
            return [drawn[0], drawn[1] + off, drawn[2]], ours.in_place

        monkeypatch.setattr(compiled_steps, "metal", ours)
        monkeypatch.setattr(compiled_steps.cuda, "is_default", lambda: False)
        monkeypatch.setattr(Steps, "_tried", tried)
        return ours

    def test_right_ones_are_taken(self, tiny_engine, ours):
        assert Steps.chosen(tiny_engine.model, compiled=True).kernels is ours

    def test_weights_are_in_memory_once_thereafter(self, ours):
        ours.off = 0.2
        model = attach_lora(tiny_llama(60, layers=6), rank=2)
        weights = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
        held = mx.get_active_memory()
        gc.disable()
        try:
            steps = Steps.chosen(model, compiled=False)
            assert mx.get_active_memory() - held < 1.2 * weights  # a GPU rounds small arrays up
        finally:
            gc.enable()
        assert steps.kernels is operations

    def test_wrong_ones_are_not_and_a_line_says_so(self, tiny_engine, ours, caplog):
        ours.off = 0.2
        assert Steps.chosen(tiny_engine.model, compiled=True).kernels is operations
        assert "differ from MLX's operations by 0.2 nats; decoding goes on" in caplog.text

    def test_broken_ones_are_not_and_a_line_says_so(self, tiny_engine, ours, caplog):
        def broken(*arguments):
            raise RuntimeError("[metal::Device] Unable to build metal library")

        ours.add_lora = broken
        assert Steps.chosen(tiny_engine.model, compiled=True).kernels is operations
        assert "failed: [metal::Device] Unable to build metal library" in caplog.text

    def test_those_that_do_not_serve_every_layer_are_not(self, tiny_engine, ours, caplog):
        ours.in_place = False
        assert Steps.chosen(tiny_engine.model, compiled=True).kernels is operations
        assert not caplog.text


@pytest.mark.parametrize("family", ["dbrx", "iquestloopcoder", "nemotron-nas"])
def test_a_model_that_cannot_be_compiled_decodes_without_steps(family, caplog):
    model = tiny_family(family)
    assert Steps.chosen(model, compiled=True) is None
    assert "does not decode by compiled steps" in caplog.text
