"""The attention with its own gradient against float64 and MLX, with scores that are kept and in tiles."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_episodes
from families import adapted, tiny_family
from mlx.utils import tree_flatten

from textpolicy.config.adapters import LoRA
from textpolicy.losses import Surrogate
from textpolicy.mlx import memory
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.mlx.kernels import attention as kernels
from textpolicy.mlx.kernels import masks
from textpolicy.mlx.kernels.attention import attention, tiled
from textpolicy.types import Batch

LENGTH, SLOTS = 5, 9
SEEN = np.random.default_rng(5).random((2, 1, LENGTH, SLOTS)) < 0.5
SEEN[..., 0] = True
MASKS = {
    "none": (None, np.ones((LENGTH, SLOTS), bool)),
    "causal": ("causal", np.tri(LENGTH, SLOTS, SLOTS - LENGTH, dtype=bool)),
    "of each row": (mx.array(SEEN), SEEN),
    "of all rows": (mx.array(SEEN[0, 0]), SEEN[0, 0]),
}


def attention_in_float64(q, k, v, scale, seen):
    """(B, H, L, E), head by head."""
    share = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a, share, axis=1) for a in (k, v))
    scores = np.where(seen, scale * q @ k.swapaxes(-1, -2), -np.inf)
    mass = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return mass / mass.sum(axis=-1, keepdims=True) @ v


def made_up(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("heads", [2, 6])
def test_attention_and_its_slopes_are_those_of_float64(name, heads):
    """The slopes by differences of the formula in float64, at a few places of each array."""
    mask, seen = MASKS[name]
    q, k, v, c = made_up((2, heads, LENGTH, 4), (2, 2, SLOTS, 4), (2, 2, SLOTS, 3), (2, heads, LENGTH, 3))

    def exact(*arrays):
        return (c * attention_in_float64(*(a.astype(np.float64) for a in arrays), 0.5, seen)).sum()

    out = attention(*map(mx.array, (q, k, v)), None, 0.5, mask)
    doubles = (a.astype(np.float64) for a in (q, k, v))
    np.testing.assert_allclose(np.array(out), attention_in_float64(*doubles, 0.5, seen), rtol=1e-5, atol=1e-6)
    slopes = mx.grad(lambda *a: (attention(*a, None, 0.5, mask) * mx.array(c)).sum(), argnums=(0, 1, 2))(
        *map(mx.array, (q, k, v))
    )
    for i, slope in enumerate(slopes):
        for place in range(0, slope.size, 7):
            step = np.zeros(slope.size)
            step[place] = 1e-4
            around = []
            for sign in (1, -1):
                moved = [a.astype(np.float64) for a in (q, k, v)]
                moved[i] = moved[i] + sign * step.reshape(slope.shape)
                around.append(exact(*moved))
            assert slope.reshape(-1)[place].item() == pytest.approx((around[0] - around[1]) / 2e-4, abs=2e-5)


def test_a_row_with_no_visible_slot_is_not_nan():
    q, k, v = map(mx.array, made_up((1, 2, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4)))
    seen = mx.array([[True, True, False], [False, False, False]])
    assert mx.isfinite(attention(q, k, v, None, 0.5, seen)).all()


@pytest.mark.parametrize("why", ["another type", "an additive mask", "a mask for each head", "sinks"])
def test_unsupported_attention_is_left_to_mlx(why):
    q, k, v = map(mx.array, made_up((1, 2, 3, 32), (1, 2, 3, 32), (1, 2, 3, 32)))
    mask, sinks = None, None
    if why == "another type":
        q, k, v = (a.astype(mx.bfloat16) for a in (q, k, v))
    elif why == "an additive mask":
        mask = mx.array(np.where(np.tri(3), 0, -np.inf).astype(np.float32))
    elif why == "a mask for each head":
        mask = mx.array(np.stack([np.tri(3), np.ones((3, 3))])[None].astype(bool))
    else:
        sinks = mx.array([0.5, -0.5])
    theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask=mask, sinks=sinks)
    assert mx.array_equal(attention(q, k, v, None, 0.5, mask, sinks), theirs)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of two queries or so, for any attention of more than two."""
    monkeypatch.setattr(kernels, "_TILE", dict.fromkeys(kernels._TILE, 64))
    monkeypatch.setattr(kernels, "FEWEST", 2)
    monkeypatch.setattr(kernels, "_KEPT", 0)


def of_every_kind(length, slots, heads):
    """Masks by name, each with at least one slot seen by every query."""
    rng = np.random.default_rng(1)
    seen = rng.random((2, 1, length, slots)) < 0.5
    seen[..., 0] = True
    band = np.tri(length, slots, slots - length, dtype=bool) & ~np.tri(length, slots, slots - length - 4, dtype=bool)
    each = rng.random((2, heads, length, slots)) < 0.5
    each[..., 1] = True
    kinds = {"booleans": seen, "a window": band, "booleans of each head": each}
    kinds["booleans of a padded prompt"] = seen[:, :, :1]
    return {"none": None, "causal": "causal", **{name: mx.array(kind) for name, kind in kinds.items()}}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", of_every_kind(1, 2, 1))
@pytest.mark.parametrize("given", [False, True])
def test_tiles_and_their_slopes_are_those_of_mlx(small_tiles, name, sinks, given):
    """With a result of their own, or made by MLX; MLX's slopes keep all scores."""
    length, slots, heads = 11, 14, 6
    mask = of_every_kind(length, slots, heads)[name]
    q, k, v, c = map(
        mx.array, made_up((2, heads, length, 8), (2, 2, slots, 8), (2, 2, slots, 8), (2, heads, length, 8))
    )
    sunk = mx.array(np.linspace(-1, 2, heads).astype(np.float32)) if sinks else None

    def theirs(q, k, v, sinks):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)

    def ours(q, k, v, sinks):
        return tiled(q, k, v, 0.3, mask, sinks, theirs if given else None)

    found, wanted = ours(q, k, v, sunk), theirs(q, k, v, sunk)
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-5, atol=1e-6)
    which = (0, 1, 2, 3) if sinks else (0, 1, 2)
    slopes = [mx.grad(lambda *a, f=f: (f(*a) * c).sum(), argnums=which)(q, k, v, sunk) for f in (ours, theirs)]
    for ours_, theirs_ in zip(*slopes, strict=True):
        np.testing.assert_allclose(np.array(ours_), np.array(theirs_), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_tiles_of_half_precision_have_slopes_of_that_precision(small_tiles, dtype):
    q, k, v, c = map(mx.array, made_up((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), (1, 4, 9, 8)))

    def slopes(*arrays):
        return mx.grad(lambda *a: (attention(*a, None, 0.3, "causal").astype(mx.float32) * c).sum(), (0, 1, 2))(*arrays)

    for half, exact in zip(slopes(*(a.astype(dtype) for a in (q, k, v))), slopes(q, k, v), strict=True):
        assert half.dtype == dtype
        np.testing.assert_allclose(np.array(half.astype(mx.float32)), np.array(exact), atol=0.04, rtol=0.04)


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr(kernels, "_TILE", dict.fromkeys(kernels._TILE, 2**15))

    def peak(length):
        arrays = [mx.random.normal((1, 2, length, 8)) for _ in range(3)]
        mx.eval(arrays)
        before = mx.get_active_memory()
        slopes = mx.grad(lambda *a: attention(*a, None, 0.3, "causal").sum(), (0, 1, 2))(*arrays)
        mx.set_memory_limit(1)  # so that MLX does not run ahead
        mx.reset_peak_memory()
        mx.eval(slopes)
        mx.set_memory_limit(2**40)
        return mx.get_peak_memory() - before

    assert kernels.too_many(mx.zeros((1, 2, 512, 8)), mx.zeros((1, 2, 512, 8)), "causal")
    assert peak(2048) < 3 * peak(1024) < 9 * peak(512)
    assert peak(2048) < 4 * 2 * 2048 * 2048 / 2  # half of one array of scores


@pytest.mark.parametrize("checkpoint_every", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_the_gradients_of_a_model_are_the_same_in_tiles(name, checkpoint_every, monkeypatch, request):
    """Families with grouped heads, windows, sinks, and running states; prompts are shared."""
    model = adapted(name, LoRA(rank=4), vocab_size=300)
    engine = MLXEngine(model, stop=[], checkpoint_every=checkpoint_every)
    episodes = random_episodes(np.random.default_rng(0))
    batch = Batch.pack(episodes, [np.linspace(-1, 1, len(e.tokens)).astype(np.float32) for e in episodes])
    objective = PolicyObjective(Surrogate())
    _, kept = engine.gradients(batch, objective)
    request.getfixturevalue("small_tiles")
    calls = []
    for module in (kernels, masks):  # on a CPU, and on a GPU without kernels of ours
        monkeypatch.setattr(module, "tiled", lambda *a, whole=tiled: calls.append(1) or whole(*a))
    monkeypatch.setattr(masks.cuda, "is_default", lambda: False)
    _, made_again = engine.gradients(batch, objective)
    assert calls
    for (place, one), (_, other) in zip(tree_flatten(kept), tree_flatten(made_again), strict=True):
        most = 3e-5 if mx.default_device() == mx.Device(mx.cpu) else 1e-4  # a GPU adds in other orders
        assert mx.linalg.norm((one - other).reshape(-1)) <= most * mx.linalg.norm(one.reshape(-1)), place


def test_addends_with_a_gradient_of_their_own_are_left_to_mlx(small_tiles, monkeypatch):
    """DeepSeek's scores of positions come as a mask."""
    monkeypatch.delattr(kernels, "tiled")
    q, k, v, c, mask = map(mx.array, made_up(*[(1, 2, 9, 8)] * 4, (1, 2, 9, 9)))
    slope = mx.grad(lambda mask: (attention(q, k, v, None, 0.3, mask) * c).sum())(mask)

    def wanted(mask):
        return ((mx.softmax(0.3 * q @ k.swapaxes(-1, -2) + mask, axis=-1) @ v) * c).sum()

    np.testing.assert_allclose(np.array(slope), np.array(mx.grad(wanted)(mask)), rtol=1e-4, atol=1e-6)
    assert memory._heads(tiny_family("deepseek_v3")) == 0
    assert memory._heads(tiny_family("llama")) > 0


def test_a_gpu_without_kernels_of_ours_makes_long_gradients_in_tiles(small_tiles, monkeypatch):
    q, k, v = map(mx.array, made_up((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)))
    seen = mx.array(np.tri(9, dtype=bool))
    calls = []
    monkeypatch.setattr(masks, "tiled", lambda *a: calls.append(a[4]) or tiled(*a))
    monkeypatch.setattr(masks.cuda, "is_default", lambda: False)
    on_gpu = masks.SharedMasks()
    slope = mx.grad(lambda q: on_gpu(q, k, v, None, 0.3, seen).sum())(q)
    wanted = mx.grad(lambda q: attention(q, k, v, None, 0.3, seen).sum())(q)
    assert calls[0] is seen  # the booleans, since addends of -inf have no slope
    np.testing.assert_allclose(np.array(slope), np.array(wanted), rtol=1e-5, atol=1e-6)
