"""TinyLoRA and LoRA-XS: the frozen SVD, what is trained and shared, and the layer around them."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from textpolicy.errors import UserError
from textpolicy.mlx.adapters.quantised import dense_weight, quantised_as
from textpolicy.mlx.adapters.tinylora import (
    Factors,
    ProjectedCore,
    SharedVectors,
    SVDLinear,
    TrainedCore,
    delta_weight,
    group_count,
    lora_size,
    lora_xs_size,
    projections,
    structured_groups,
    tiled_groups,
    tinylora_size,
    truncated_svd,
    tying_groups,
)

PLACEMENTS = ("paper", "peft", "loraxs_code")


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def linear(outputs, inputs, seed=0, bias=True):
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.weight = normal(outputs, inputs, seed=seed)
    if bias:
        layer.bias = normal(outputs, seed=seed + 100)
    return layer


class Pair(nn.Module):
    """Two layers, one after the other, that share one v."""

    def __init__(self, u=3, rank=2):
        super().__init__()
        self.vectors = SharedVectors(1, u)
        self.layers = [
            SVDLinear(
                base, truncated_svd(base.weight, rank), ProjectedCore(self.vectors, 0, projections(u, rank, seed))
            )
            for seed, base in enumerate([linear(5, 4, seed=1), linear(3, 5, seed=2)])
        ]

    def __call__(self, x):
        return self.layers[1](mx.tanh(self.layers[0](x)))


def loss(model, x):
    return (model(x) ** 2).sum()


# ---- the SVD


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 3), (60, 40)])
def test_factors_are_the_best_approximation_of_their_rank(shape):
    weight = normal(*shape)
    for rank in range(1, min(shape) + 1):
        factors = truncated_svd(weight, rank)
        error = np.linalg.norm(np.array(weight - (factors.u * factors.s) @ factors.vt))
        left_out = np.linalg.svd(np.array(weight, np.float64), compute_uv=False)[rank:]
        assert error == pytest.approx(np.sqrt((left_out**2).sum()), abs=1e-4)
        assert all(a >= b for a, b in pairwise(factors.s.tolist()))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_largest_entry_of_every_left_vector_is_positive(rank):
    for seed in range(5):
        u = np.array(truncated_svd(normal(7, 4, seed=seed), rank).u)
        assert all(max(column, key=abs) > 0 for column in u.T)


def test_the_leading_factors_do_not_depend_on_the_rank():
    weight = normal(12, 9)
    few, all_of_them = truncated_svd(weight, 2), truncated_svd(weight, 9)
    for name in ("u", "s", "vt"):
        one, other = np.array(getattr(few, name)), np.array(getattr(all_of_them, name))
        np.testing.assert_allclose(one, other[:, :2] if name == "u" else other[:2], atol=1e-5)


def test_a_rank_above_the_smaller_side_is_cut_to_it():
    factors = truncated_svd(normal(3, 8), 5)
    assert (factors.u.shape, factors.s.shape, factors.vt.shape) == ((3, 3), (3,), (3, 8))


def test_another_sign_is_another_adapter():
    factors, core = truncated_svd(normal(4, 4), 2), normal(2, 2)
    turn = mx.array([-1.0, 1.0])
    turned = Factors(factors.u * turn, factors.s, factors.vt * turn[:, None])
    np.testing.assert_allclose((turned.u * turned.s) @ turned.vt, (factors.u * factors.s) @ factors.vt, atol=1e-6)
    assert np.abs(np.array(delta_weight(turned, core) - delta_weight(factors, core))).max() > 0.1


# ---- what is added to the weight


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_change_is_a_sum_over_pairs_of_singular_vectors(placement):
    factors, core = truncated_svd(normal(4, 3), 2), normal(2, 2, seed=7)
    u, s, vt, r = (np.array(a, np.float64) for a in (factors.u, factors.s, factors.vt, core))
    expected = np.zeros((4, 3))
    for k in range(2):
        for j in range(2):
            sigma = {"paper": s[k], "peft": math.sqrt(s[k] * s[j]), "loraxs_code": s[j]}[placement]
            expected += 0.5 * sigma * r[k, j] * np.outer(u[:, k], vt[j])
    np.testing.assert_allclose(delta_weight(factors, core, placement, scale=0.5), expected, atol=1e-5)


def test_the_identity_gives_back_the_approximation_wherever_sigma_stands():
    factors = truncated_svd(normal(4, 3), 3)
    for placement in PLACEMENTS:
        np.testing.assert_allclose(delta_weight(factors, mx.eye(3), placement), normal(4, 3), atol=1e-5)


def test_projections_have_variance_one_over_rank_and_come_back_from_their_seed():
    p = projections(4000, 4, seed=42)
    assert float(p.var()) == pytest.approx(1 / 4, rel=0.02)
    assert float(p.mean()) == pytest.approx(0, abs=0.01)
    assert mx.array_equal(p, projections(4000, 4, seed=42))
    assert not mx.array_equal(p, projections(4000, 4, seed=43))


# ---- the layer


def test_at_the_start_the_model_is_exactly_itself_and_its_gradient_is_not_zero():
    model, x = Pair(), normal(6, 4, seed=9)
    plain = model.layers[1].linear(mx.tanh(model.layers[0].linear(x)))
    assert mx.array_equal(model(x), plain)
    grads = nn.value_and_grad(model, loss)(model, x)[1]
    assert float(mx.abs(grads["vectors"]["v"]).min()) > 0


def test_a_shared_v_is_one_array_whose_gradient_comes_from_every_layer():
    model, x = Pair(), normal(6, 4, seed=9)
    model.vectors.v = mx.array([[0.1, -0.2, 0.3]])
    assert [(name, a.shape) for name, a in tree_flatten(model.trainable_parameters())] == [("vectors.v", (1, 3))]
    grad = nn.value_and_grad(model, loss)(model, x)[1]["vectors"]["v"][0].tolist()
    v, step = np.array(model.vectors.v), 1e-2
    for i in range(3):
        values = []
        for sign in (1, -1):
            model.vectors.v = mx.array(v + sign * step * np.eye(3, dtype=np.float32)[i])
            values.append(float(loss(model, x)))
        assert grad[i] == pytest.approx((values[0] - values[1]) / (2 * step), rel=5e-3, abs=5e-2)


def test_training_moves_v_alone_and_lowers_the_loss():
    model, x = Pair(), normal(6, 4, seed=9)
    frozen = {k: a for k, a in tree_flatten(model.parameters()) if k != "vectors.v"}
    optimizer, compute = optim.Adam(0.02), nn.value_and_grad(model, loss)
    first = float(loss(model, x))
    for _ in range(20):
        optimizer.update(model, compute(model, x)[1])
    assert float(loss(model, x)) < first
    after = dict(tree_flatten(model.parameters()))
    assert len(frozen) == 10  # weight, bias, left, right and P of both layers
    assert all(mx.array_equal(a, after[k]) for k, a in frozen.items())


def test_layers_of_different_groups_have_vectors_of_their_own():
    vectors, p = SharedVectors(2, 2), projections(2, 2, 0)
    cores = [ProjectedCore(vectors, group, p) for group in (0, 1)]
    vectors.v = mx.array([[1.0, 0.0], [0.0, 1.0]])
    assert mx.array_equal(cores[0](), p[0])
    assert mx.array_equal(cores[1](), p[1])


def test_a_copy_of_the_model_reads_its_own_v():
    model = Pair()
    twin = copy.deepcopy(model)
    twin.vectors.v = mx.ones((1, 3))
    assert mx.array_equal(model.layers[0].core(), mx.zeros((2, 2)))
    assert not mx.array_equal(twin.layers[0].core(), mx.zeros((2, 2)))


def test_lora_xs_trains_one_small_square_that_starts_near_zero():
    base = linear(5, 4)
    layer = SVDLinear(base, truncated_svd(base.weight, 3), TrainedCore(3, seed=0), "loraxs_code")
    assert [(name, a.shape) for name, a in tree_flatten(layer.trainable_parameters())] == [("core.r", (3, 3))]
    assert 0 < float(mx.abs(layer.core.r).max()) < 5e-5
    assert not mx.array_equal(layer.core.r, TrainedCore(3, seed=1).r)


def test_lora_xs_with_the_r_of_a_tinylora_is_the_same_layer():
    base, x = linear(5, 4), normal(2, 7, 4, seed=3)
    factors, vectors = truncated_svd(base.weight, 2), SharedVectors(1, 3)
    vectors.v = normal(1, 3, seed=4)
    tiny = SVDLinear(base, factors, ProjectedCore(vectors, 0, projections(3, 2, 0)), "peft")
    xs = SVDLinear(base, factors, TrainedCore(2, seed=0), "peft")
    xs.core.r = tiny.core()
    assert mx.array_equal(xs(x), tiny(x))


@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_layer_computes_what_the_adapted_one_does(bias):
    base, x = linear(5, 4, bias=bias), normal(6, 4, seed=3)
    layer = SVDLinear(base, truncated_svd(base.weight, 2), TrainedCore(2, seed=0))
    layer.core.r = normal(2, 2)
    np.testing.assert_allclose(layer.fuse()(x), layer(x), atol=1e-5)


def test_a_quantised_layer_is_adapted_over_the_weight_it_really_has():
    base = nn.QuantizedLinear.from_linear(linear(16, 64), group_size=32, bits=8)
    layer = SVDLinear(base, truncated_svd(dense_weight(base), 2), TrainedCore(2, seed=0), scale=0.01)
    layer.core.r = normal(2, 2)
    x = normal(3, 64, seed=3)
    whole = dense_weight(base) + layer.left @ layer.core.r @ layer.right
    np.testing.assert_allclose(layer(x), x @ whole.T + base.bias, atol=1e-3)
    np.testing.assert_allclose(layer.fuse()(x), layer(x), atol=1e-3)
    fused = quantised_as(base, layer.fuse())
    assert (fused.bits, fused.group_size, fused.mode) == (8, 32, "affine")
    assert float(mx.abs(dense_weight(fused) - whole).max()) < 0.05
    assert [name for name, _ in tree_flatten(layer.trainable_parameters())] == ["core.r"]


def test_a_bfloat16_model_keeps_its_dtype_around_float32_factors():
    base = linear(5, 4)
    base.set_dtype(mx.bfloat16)
    layer = SVDLinear(base, truncated_svd(base.weight, 2), TrainedCore(2, seed=0))
    assert layer(normal(2, 4).astype(mx.bfloat16)).dtype == mx.bfloat16
    assert layer.left.dtype == layer.core.r.dtype == mx.float32
    assert layer.fuse().weight.dtype == mx.float32  # a merged layer is rounded once, at the end


# ---- tying and sizes


def test_balanced_groups_differ_by_at_most_one_module():
    assert tying_groups(7, 5) == [0, 0, 1, 2, 2, 3, 4]
    for modules in range(1, 12):
        for groups in range(1, modules + 1):
            sizes = np.bincount(tying_groups(modules, groups))
            assert len(sizes) == groups
            assert sizes.max() - sizes.min() <= 1


def test_peft_leaves_the_rest_to_its_last_group():
    assert tying_groups(7, 5, "peft") == [0, 1, 2, 3, 4, 4, 4]


def test_tiled_ties_neighbours_and_structured_ties_kinds():
    names = [f"model.layers.{i}.{kind}" for i in range(4) for kind in ("self_attn.q_proj", "mlp.down_proj")]
    assert tiled_groups(8, 2) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert structured_groups(names, 2) == [0, 2, 0, 2, 1, 3, 1, 3]
    assert structured_groups(names, 4) == [0, 1] * 4


def test_kinds_with_different_counts_do_not_share_groups():
    assert structured_groups(["0.q", "0.k", "1.q", "2.q"], 1) == [0, 3, 1, 2]


def test_no_tied_group_is_larger_than_n_tie():
    for modules in range(1, 20):
        for n_tie in range(1, modules + 1):
            assert np.bincount(tiled_groups(modules, n_tie)).max() <= n_tie


def test_sizes_are_those_of_the_papers():
    assert tinylora_size([0, 0, 1, 1, 2], u=13) == 39
    assert lora_size([(10, 20), (20, 5)], rank=2) == 2 * 30 + 2 * 25
    assert lora_xs_size(7, rank=3) == 63


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated_svd(normal(3, 3), 0), "rank of the SVD is 0"),
        (lambda: truncated_svd(mx.zeros((3, 4)), 1), "all zeros or not finite"),
        (lambda: truncated_svd(mx.full((3, 4), mx.nan), 1), "all zeros or not finite"),
        (lambda: delta_weight(truncated_svd(normal(3, 3), 1), mx.eye(1), "papers"), "did you mean 'paper'"),
        (lambda: tying_groups(3, 4), "1 to 3"),
        (lambda: tying_groups(3, 1, "even"), "no layout of tying groups 'even'"),
        (lambda: group_count(4, 1.5), "tying is 1.5"),
        (lambda: tiled_groups(4, 0), "n_tie is 0"),
        (lambda: structured_groups(["0.q", "1.q"], 3), "2 modules are of kind q"),
    ],
)
def test_an_invalid_setting_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
