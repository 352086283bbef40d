"""Every family that mlx-lm has trains with an adapter on its default layers, or is refused in a sentence."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import recipe
from families import FAMILIES, VOCABULARY, adapted, tiny_family
from mlx.utils import tree_flatten

from textpolicy.config.adapters import DoRA, Full, LoRA, LoRAXS
from textpolicy.errors import UserError
from textpolicy.losses import Surrogate
from textpolicy.mlx.adapters.merging import attach, load_adapter, merge_adapters, save_adapter, trainable
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.types import Completion, Episode

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 12, 13]]
TOKENS = mx.array([PROMPTS[0]])
READS_ITSELF = {  # families whose code multiplies by the weights of linear layers
    "gemma3n": ("altup.correction_coefs", "altup.prediction_coefs"),
    "kimi_k3": ("mlp_res_proj", "self_attention_res_proj"),
}
CANNOT_SHARE = {"afm7", "deepseek_v41", "gpt_bigcode", "llama4", "minimax_m3_vl"}  # whose caches fork wrongly


def batch():
    rng, episodes = np.random.default_rng(2), []
    for i, prompt in enumerate([*PROMPTS, *PROMPTS]):
        tokens = rng.integers(1, VOCABULARY, 6).astype(np.int32)
        completion = Completion(tokens, rng.uniform(-5, -4, 6).astype(np.float32))
        episodes.append(Episode.from_completion(prompt, completion, reward=float(rng.random()), group=i % 2))
    return recipe("grpo").credit(episodes)


@pytest.mark.parametrize("name", READS_ITSELF)
def test_layers_whose_weights_a_model_reads_itself_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"{name} reads the weights of ") as refused:
        attach(tiny_family(name), LoRA(rank=4))
    assert all(layer in str(refused.value) for layer in READS_ITSELF[name])
    attach(tiny_family(name), LoRA(rank=4, modules=("o_proj",)))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "afm7"])
def test_activations_computed_again_leave_the_loss_and_gradients_of_every_family(name):
    model, objective = adapted(name, LoRA(rank=4)), PolicyObjective(Surrogate())
    if name in CANNOT_SHARE:
        with pytest.raises(UserError, match=r"choose (another model|a model with)"):
            MLXEngine(model, stop=[0]).gradients(batch(), objective)
        return
    loss, kept = MLXEngine(model, stop=[0]).gradients(batch(), objective)
    again, ours = MLXEngine(model, stop=[0], checkpoint_every=1).gradients(batch(), objective)
    assert again["loss"] == pytest.approx(loss["loss"], rel=1e-5, abs=1e-6)
    exact = dict(tree_flatten(kept))
    largest = max(float(mx.abs(value).max()) for value in exact.values())
    assert largest > 1e-4
    near = 1e-5 if mx.default_device() == mx.cpu else 1e-4  # a GPU adds the gradients of experts in any order
    for key, value in tree_flatten(ours):
        assert float(mx.abs(value - exact[key]).max()) < near * largest, key


OTHERS = ["gemma4_text", "kimi_k3", "nemotron-nas", "recurrent_gemma"]


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        *[(name, LoRA(rank=4)) for name in FAMILIES if name != "afm7"],
        *[(name, kind) for kind in (DoRA(rank=4), LoRAXS(rank=4)) for name in OTHERS],
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_an_adapter_of_every_family_is_read_back_and_merged(name, adapter, tmp_path):
    model = adapted(name, adapter)
    expected = np.array(model(TOKENS))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_family(name), tmp_path / "adapter")
    np.testing.assert_allclose(again(TOKENS), expected, atol=1e-5)
    np.testing.assert_allclose(merge_adapters(model)(TOKENS), expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "falcon_h1", "deepseek_v3"])
def test_weights_trained_in_full_are_float32_and_read_back_onto_halves(name, tmp_path):
    def half():
        model = tiny_family(name)
        model.set_dtype(mx.bfloat16)
        return model

    model = attach(half(), Full())
    assert {value.dtype for value in trainable(model).values()} == {mx.float32}
    engine = MLXEngine(model, stop=[0])
    assert engine.update(batch(), Surrogate(), 1e-5)["updated"] == 1
    moments = [value for key, value in tree_flatten(engine.optimizer.state) if key.endswith((".m", ".v"))]
    assert moments
    assert {value.dtype for value in moments} == {mx.float32}
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(half(), tmp_path / "adapter")
    assert np.array_equal(np.array(again(TOKENS)), np.array(model(TOKENS)))
