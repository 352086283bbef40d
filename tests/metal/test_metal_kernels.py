"""Nothing that is differentiated passes through a Metal kernel of mlx-lm; what cannot avoid one is refused."""

import ast
import importlib
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
from conftest import recipe
from families import FAMILIES, VOCABULARY, adapted, tiny_config
from mlx.utils import tree_flatten
from mlx_lm.models.bitlinear_layers import bitnet_quantize
from pretended_metal import metal  # noqa: F401 (a fixture)

from textpolicy.config.adapters import LoRA
from textpolicy.config.settings import Config
from textpolicy.engine import Sampling
from textpolicy.errors import UserError
from textpolicy.losses import Surrogate
from textpolicy.mlx import models
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.mlx.kernels import plain
from textpolicy.mlx.memory import Costs, Workload
from textpolicy.mlx.score.micro_batches import Gradients, Layout, score
from textpolicy.run.assembly import build_engine
from textpolicy.training.flat import FlatPasses, FlatTokens
from textpolicy.training.trainer import Trainer
from textpolicy.types import Completion, Episode

ROOT = Path(mlx_lm.__file__).parent
WITH_OPERATIONS = {"deepseek_v41", "gated_delta", "kimi_k3", "rwkv7", "ssm"}  # beside their kernels
OF_ITS_TRAINER = {"losses"}  # of mlx-lm's, which nothing here uses
CANNOT_SHARE = {"deepseek_v41"}  # refused on every device, for its caches


@cache
def imports(path):
    """Return the files of mlx-lm that ``path`` imports from, and those that they do."""
    found = {path}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            home = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [home.with_suffix(".py"), home / "__init__.py", *(home / f"{a.name}.py" for a in node.names)]
            found = found.union(*(imports(name) for name in names if name.is_file() and name != path))
    return found


KERNELS = {path for path in ROOT.rglob("*.py") if "metal_kernel(" in path.read_text()}
REACHED = [name for name in FAMILIES if imports(ROOT / "models" / f"{name}.py") & KERNELS]


def test_every_kernel_of_mlx_lm_is_known():
    """A new one has operations beside it, which ``plain_operations`` chooses, or its layers are refused."""
    alone = {path.stem for path in KERNELS if path.parent.name == "models"} - WITH_OPERATIONS
    reading = {path.stem for path in ROOT.glob("models/*.py") if imports(path) & set(ROOT.glob("kernels/*.py"))}
    assert {path.parent.name for path in KERNELS} <= {"models", "kernels", "tuner"}
    assert {path.stem for path in KERNELS if path.parent.name == "tuner"} == OF_ITS_TRAINER
    assert alone | reading == set(plain._KERNELS_ALONE)
    assert len(REACHED) >= 13


def test_every_choice_of_a_kernel_asks_for_the_device_through_mx():
    """What ``plain_operations`` exchanges is ``mx`` in the models: any other way to ask would not see it."""
    for path in (ROOT / "models").glob("*.py"):
        source = path.read_text()
        assert "import mlx.core as mx" in source or "default_device" not in source, path.name
        assert "can_run_metal" not in source, path.name


def widths(width):
    """The entries of config.json that make heads of the kernels ``width`` wide, in every family."""
    names = ("linear_key_head_dim", "linear_value_head_dim", "head_dim", "mamba_d_head", "mamba_head_dim")
    linear = {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 2, "short_conv_kernel_size": 3}
    return {
        **dict.fromkeys(names, width),
        "linear_attn_config": {**linear, "head_dim": width},
        "mamba_d_ssm": 4 * width,
        "hidden_size": max(32, width),
    }


def batch(lengths):
    rng, episodes = np.random.default_rng(2), []
    for i, length in enumerate(lengths):
        tokens = rng.integers(1, VOCABULARY, length).astype(np.int32)
        completion = Completion(tokens, rng.uniform(-5, -4, length).astype(np.float32))
        prompt = [5, 6, 7, 8, 9, 10 + i % 2, 11]
        episodes.append(Episode.from_completion(prompt, completion, reward=float(i % 3), group=i % 2))
    return recipe("grpo").credit(episodes)


@pytest.mark.parametrize(("width", "every"), [(32, 0), (128, 1)])
@pytest.mark.parametrize("name", [name for name in REACHED if name not in CANNOT_SHARE])
def test_updates_and_scores_are_those_of_the_plain_operations(name, width, every, metal, monkeypatch):  # noqa: F811
    model = adapted(name, LoRA(rank=2), **widths(width))
    rows, objective = batch((4, 1, 1, 3)), PolicyObjective(Surrogate())
    engine = MLXEngine(model, stop=[0], checkpoint_every=every, compile=False)
    metal.clear()  # the engine's look at the model's tables may use them
    stats, gradients = engine.gradients(rows, objective)
    scores = engine.score(rows)
    assert metal == []
    score(model, Layout.build(rows), gradient=False)
    assert metal or sys.platform == "darwin"  # the same passes without the exchange take kernels
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    exact, expected = engine.gradients(rows, objective)
    assert stats["loss"] == pytest.approx(exact["loss"], rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(scores, engine.score(rows), atol=1e-4)
    largest = max(float(mx.abs(value).max()) for _, value in tree_flatten(expected))
    for (key, value), (_, other) in zip(tree_flatten(gradients), tree_flatten(expected), strict=True):
        assert float(mx.abs(value - other).max()) < 1e-4 * largest, key


@pytest.mark.parametrize("name", ["qwen3_next", "rwkv7", "nemotron_h"])
def test_a_users_own_loss_and_the_measured_memory_take_plain_operations_too(name, metal):  # noqa: F811
    model, rows = adapted(name, LoRA(rank=2), **widths(32)), batch((3, 1))
    tokens = FlatTokens(rows, mx.zeros(4), mx.array([0.5, 0.5, 0.5, -1.0]), mx.array([3, 1]))
    passes = [FlatPasses(model, Gradients(model), size, 0) for size in (None, 1)]
    metal.clear()
    losses = [flat.gradients(tokens, lambda old, new, advantages, _: -(new * advantages).sum())[0] for flat in passes]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    costs = Costs.measure(model, limit=1e6)
    assert costs.update(Workload(1, 2, 8, 4), 64) > costs.update(Workload(1, 2, 4, 2), 64) > costs.weights
    assert metal == []


def ternary():
    """A tiny BitNet with packed weights."""
    bitnet = importlib.import_module("mlx_lm.models.bitnet")
    config = {**tiny_config("llama"), "model_type": "bitnet"}
    return bitnet_quantize(bitnet.Model(bitnet.ModelArgs.from_dict(config)), {})


def muse_spark():
    module = importlib.import_module("mlx_lm.models.muse_spark")
    config = {"mlp_layer_types": None, "moe_hidden_size": 32, "num_shared_experts": 0}
    return module.Model(module.ModelArgs.from_dict(tiny_config("muse_spark", **config)))


@pytest.mark.parametrize(
    ("make", "what"), [(ternary, "packed weights of BitNet"), (muse_spark, "layers of Muse Spark")]
)
def test_a_model_of_kernels_alone_is_sampled_from_and_refused_for_training(make, what, metal, monkeypatch):  # noqa: F811
    model = make()
    model.freeze()
    model.lm_head.unfreeze() if "lm_head" in model else model.unfreeze()
    engine = MLXEngine(model, stop=[0])
    assert len(engine.sample([[5, 6, 7]], 2, Sampling(max_tokens=3))[0]) == 2
    assert metal or sys.platform == "darwin"
    assert np.isfinite(engine.score(batch((2, 1)))).all()
    with pytest.raises(UserError, match=rf"{what} are computed by a Metal kernel.* another model to train"):
        engine.update(batch((4, 1, 1, 3)), Surrogate(), 1e-3)
    with pytest.raises(UserError, match=what):
        Trainer(model, lambda rewards: rewards, lambda *_: mx.zeros(()), optim.SGD(0.1))
    monkeypatch.setattr(models, "load_model", lambda *_, **__: (model, None))
    with pytest.raises(UserError, match=what):
        build_engine(Config())


def test_kimi_k3_samples_by_the_adapter_as_it_is_now():
    """Its layers would compile a step for themselves, and keep the weights of that day."""
    model = adapted("kimi_k3", LoRA(rank=2), **widths(32))
    engine = MLXEngine(model, stop=[0], compile=False)
    engine.sample([[5, 6, 7]], 2, Sampling(max_tokens=3))
    assert all(vars(part).get("_step") is None for part in model.modules())
