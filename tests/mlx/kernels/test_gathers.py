"""Gathers whose gradients add in a fixed order: against NumPy's sums and mlx-lm's own, and what is left of scatters."""

import re

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import tiny_family
from mlx.utils import tree_flatten
from mlx_lm.models import switch_layers

from textpolicy.config.adapters import Full, LoRA, QLoRA
from textpolicy.mlx.adapters.merging import attach
from textpolicy.mlx.kernels.gathers import (
    gather_mm,
    gather_qmm,
    gather_sort,
    in_order,
    take_by_product,
    take_rows,
    unsteady,
)
from textpolicy.mlx.kernels.patching import patched
from textpolicy.mlx.read import context
from textpolicy.mlx.score import micro_batches
from textpolicy.mlx.score.micro_batches import Layout, padded, score
from textpolicy.types import Batch, Completion, Episode


def slopes_of(take, array, rows, weights, compiled=False):
    gradient = mx.grad(lambda a: (take(a, rows) * weights).sum())
    return (mx.compile(gradient) if compiled else gradient)(array)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("sources", "rows", "shape"),
    [
        (1, [0] * 16, (2, 5, 4)),
        (3, [2, 0, 2, 2, 1, 0], (7,)),
        (4, [3, 3, 3], (1, 1, 1)),
        (5, [4], (2, 3)),
        (2, [0, 1], (0, 3)),
        (6, [1, 1, 1, 5] * 9, ()),
    ],
)
def test_a_rows_gradient_is_the_sum_over_all_its_uses(sources, rows, shape, compiled):
    rng = np.random.default_rng(len(rows))
    array, weights = rng.normal(size=(sources, *shape)), rng.normal(size=(len(rows), *shape))
    expected = np.zeros((sources, *shape))
    np.add.at(expected, rows, weights)
    a, w, r = mx.array(array, mx.float32), mx.array(weights, mx.float32), mx.array(rows)
    assert take_by_product(a, r).tolist() == a[r].tolist()
    np.testing.assert_allclose(np.array(slopes_of(take_by_product, a, r, w, compiled)), expected, atol=1e-5)
    if array.size and mx.default_device() == mx.Device(mx.cpu):  # MLX 0.32.4 divides by the size
        assert slopes_of(take_rows, a, r, w).tolist() == slopes_of(lambda a, r: a[r], a, r, w).tolist()  # on a CPU


def test_many_small_slopes_in_half_precision_are_not_lost_beside_a_large_one():
    """One by one in bfloat16, 256 + 1 is 256."""
    weights = mx.array([256.0] + [1.0] * 255, mx.bfloat16)
    gradient = slopes_of(take_by_product, mx.zeros((1,), mx.bfloat16), mx.zeros((256,), mx.int32), weights)
    assert gradient.dtype == mx.bfloat16
    assert gradient.item() == pytest.approx(511, rel=2**-8)


@pytest.mark.parametrize("experts", [1, 2, 4, 7])
@pytest.mark.parametrize("leading", [(70,), (3, 25), (1, 64)])
def test_tokens_are_sorted_by_expert_as_mlx_lm_does_it(leading, experts):
    rng = np.random.default_rng(experts)
    x = mx.array(rng.normal(size=(*leading, 1, 1, 6)), mx.float32)
    indices = mx.array(rng.integers(0, 9, (*leading, experts)))
    weights = mx.array(rng.normal(size=(np.prod(leading) * experts, 1, 6)), mx.float32)
    for ours, theirs in zip(gather_sort(x, indices), switch_layers._gather_sort(x, indices), strict=True):
        assert ours.tolist() == theirs.tolist()

    def slopes(sort):
        return mx.grad(lambda x: (sort(x, indices)[0] * weights).sum())(x)

    np.testing.assert_allclose(np.array(slopes(gather_sort)), np.array(slopes(switch_layers._gather_sort)), atol=1e-5)


def batch():
    """Seven rows of two prompts; three of a prompt's are equal, which are scored once. All parts are long: below 64
    pairs of a token and an expert mlx-lm does not sort."""
    rng, episodes = np.random.default_rng(0), []
    shared = rng.integers(1, 50, 30).tolist()
    for group, more in enumerate([rng.integers(1, 50, 15).tolist(), rng.integers(1, 50, 12).tolist()]):
        prompt = shared + more
        equal = rng.integers(1, 50, 20)
        for tokens in (equal, equal, rng.integers(1, 50, 17), equal)[: 4 - group]:
            c = Completion(tokens.astype(np.int32), np.full(len(tokens), -3, np.float32), None)
            episodes.append(Episode.from_completion(prompt, c, reward=0.0, group=group))
    return Batch.pack(episodes, [rng.normal(size=len(e.tokens)).astype(np.float32) * e.mask for e in episodes])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("outputs", [5, 128])
def test_a_product_with_a_tokens_experts_has_mlxs_gradients_without_a_scatter(shared, outputs, tmp_path):
    rng = np.random.default_rng(0)
    indices = mx.array(rng.integers(0, 4, (2, 7, 3)))  # expert 4 has no token
    a = mx.array(rng.normal(size=(2, 7, 1 if shared else 3, 1, 6)))
    b, slope = mx.array(rng.normal(size=(5, 6, outputs))), mx.array(rng.normal(size=(2, 7, 3, 1, outputs)))

    def gradients(product):
        def loss(a, b):
            return (product(a, b, rhs_indices=indices, sorted_indices=False) * slope).sum()

        return mx.value_and_grad(loss, argnums=(0, 1))(a, b)

    mx.export_to_dot(str(tmp_path / "graph"), gradients(gather_mm))
    assert "Scatter" not in (tmp_path / "graph").read_text()
    loss, slopes = gradients(gather_mm)
    with mx.stream(mx.cpu):  # MLX's own gradient asks for more shared memory than there is on CUDA
        wanted, theirs = gradients(mx.gather_mm)
        mx.eval(wanted, theirs)
    for one, other in zip((loss, *slopes), (wanted, *theirs), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("mode", "bits", "group"), [("affine", 4, 64), ("mxfp4", 4, 32)])
def test_a_product_with_quantized_experts_has_mlxs_gradient_of_tokens_without_a_scatter(
    mode, bits, group, shared, tmp_path
):
    rng = np.random.default_rng(0)
    w, *scales = mx.quantize(mx.array(rng.normal(size=(5, 96, 64)), mx.float32), group, bits, mode=mode)
    scales = (*scales, None)[:2]  # the second are biases, which mxfp4 lacks
    indices = mx.array(rng.integers(0, 4, (2, 7, 3)))
    x = mx.array(rng.normal(size=(2, 7, 1 if shared else 3, 1, 64)), mx.float32)
    slope = mx.array(rng.normal(size=(2, 7, 3, 1, 96)), mx.float32)
    how = {"transpose": True, "group_size": group, "bits": bits, "mode": mode}

    def gradient(product):
        def loss(x):
            return (product(x, w, *scales, rhs_indices=indices, sorted_indices=False, **how) * slope).sum()

        return mx.value_and_grad(loss)(x)

    mx.export_to_dot(str(tmp_path / "graph"), gradient(gather_qmm))
    assert "Scatter" not in (tmp_path / "graph").read_text()
    with mx.stream(mx.cpu):
        wanted = gradient(mx.gather_qmm)
        mx.eval(wanted)
    for one, other in zip(gradient(gather_qmm), wanted, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("outputs", [4, 32])
def test_sorted_tokens_with_an_inserted_axis_and_their_slopes_are_read_where_they_are(outputs, monkeypatch):
    """MLX on CUDA takes the stride of that axis, 1, for the distance between tokens."""
    rng, strides = np.random.default_rng(0), []
    tokens, b = mx.array(rng.normal(size=(90, 8))), mx.array(rng.normal(size=(4, 8, outputs)))
    indices = mx.array(np.sort(rng.integers(0, 4, 90)).astype(np.uint32))
    c = mx.array(rng.normal(size=(90, outputs)))
    assert memoryview(mx.contiguous(mx.expand_dims(tokens, -2))).strides[1] == 4  # so the test can fail
    whole = mx.gather_mm

    def loss(tokens):
        product = gather_mm(mx.expand_dims(tokens, -2), b, rhs_indices=indices, sorted_indices=True)
        return (product * mx.expand_dims(c, -2)).sum()

    def noted(a, *others, **named):
        strides.append(memoryview(a).strides)
        return whole(a, *others, **named)

    value, slope = mx.value_and_grad(loss)(tokens)
    chosen = np.array(b)[np.array(indices)]
    np.testing.assert_allclose(value.item(), np.einsum("pd,pdn,pn->", np.array(tokens), chosen, np.array(c)), rtol=1e-4)
    np.testing.assert_allclose(np.array(slope), np.einsum("pdn,pn->pd", chosen, np.array(c)), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(mx, "gather_mm", noted)
    loss(tokens)
    assert strides == [(32, 32, 4)]


@pytest.mark.parametrize(
    ("family", "adapter"),
    [("phixtral", LoRA(rank=4)), ("qwen3_moe", LoRA(rank=4)), ("gpt_oss", LoRA(rank=4)), ("qwen3_moe", QLoRA(rank=4))],
)
def test_few_pairs_of_token_and_expert_add_in_a_fixed_order(family, adapter, tmp_path):
    wide = {"hidden_size": 64, "moe_intermediate_size": 64} if isinstance(adapter, QLoRA) else {}
    model = attach(tiny_family(family, **wide), adapter)
    model.load_weights([(n, v + 0.1) for n, v in tree_flatten(model.trainable_parameters())], strict=False)
    completion = Completion(np.array([5, 6, 7], np.int32), np.full(3, -3, np.float32), None)
    rows = Batch.pack(
        [Episode.from_completion([1, 2, 3, 4], completion, reward=0.0, group=0)], [np.ones(7, np.float32)]
    )
    scatters = []
    found = []
    for names, device in (({}, mx.cpu), (in_order(), mx.default_device())):
        with patched(model, names), mx.stream(device):
            gradients = nn.value_and_grad(model, lambda model: score(model, Layout.build(rows)).sum())(model)[1]
            mx.export_to_dot(str(tmp_path / "graph"), gradients)
            mx.eval(gradients)
        scatters.append((tmp_path / "graph").read_text().count('"Scatter Sum"'))
        found.append(tree_flatten(gradients))
    assert scatters[1] < scatters[0]
    for (name, a), (_, b) in zip(*found, strict=True):
        atol = 1e-5 + 1e-4 * mx.abs(a).max().item()  # sums of a GPU, in another order, against those of a CPU
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("family", "changes", "unsorted"),  # 4 layers x 3 levels, but header and rests end in their last layer's keys
    [("llama", {}, 0), ("qwen3_moe", {"num_experts_per_tok": 3}, 10), ("gpt_oss", {"num_experts_per_tok": 3}, 10)],
)
def test_a_gradient_as_on_a_gpu_equals_the_cpus_and_no_scatter_in_it_uses_a_place_twice(
    family, changes, unsorted, monkeypatch, tmp_path
):
    model = attach(tiny_family(family, **changes), LoRA(rank=4))
    model.load_weights([(n, v + 0.1) for n, v in tree_flatten(model.trainable_parameters())], strict=False)
    rows = batch()
    for layout in (Layout.build(rows), padded(Layout.build(rows), prompts=True)):
        used: list[int] = []

        def counted(array, rows, used=used):
            used.append(len(rows))
            return take_by_product(array, rows)

        def gradients(layout=layout):
            def loss(model):
                return (score(model, layout) * mx.array(layout.rows.advantages)).sum()

            return nn.value_and_grad(model, loss)(model)[1]

        with mx.stream(mx.cpu):
            plain = gradients()
            mx.eval(plain)
        for library in (context, micro_batches):
            monkeypatch.setattr(library, "take_rows", counted)
        with patched(model, in_order()):
            steady = gradients()
        mx.export_to_dot(str(tmp_path / "graph"), steady)  # before anything is computed
        monkeypatch.undo()
        assert used
        for (name, a), (_, b) in zip(tree_flatten(steady), tree_flatten(plain), strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=5e-5, err_msg=name)
        # what is left, each place once: the positions before a sampled token, the grid of log-probs, tokens unsorted
        left = re.findall(r'label ="(Scatter[^"]*)"', (tmp_path / "graph").read_text())
        assert left.count("Scatter Sum") == len(layout.passes) + 1 + unsorted, left


@pytest.mark.parametrize(
    ("family", "adapter", "dtype", "metal", "named"),
    [
        ("llama", LoRA(rank=4), mx.float32, True, []),
        ("llama", LoRA(rank=4), mx.bfloat16, True, []),
        ("llama", LoRA(rank=4), mx.bfloat16, False, ["attention"]),
        ("llama", LoRA(rank=4, modules=["model.embed_tokens"]), mx.float32, False, ["embeddings"]),
        ("gpt_oss", LoRA(rank=4), mx.float32, True, []),
        ("gpt_oss", Full(), mx.float32, True, ["embeddings", "biases"]),
        ("qwen3_moe", Full(), mx.float32, True, ["embeddings"]),
        ("llama", Full(), mx.float32, False, ["embeddings"]),
    ],
)
def test_a_run_on_a_gpu_records_what_is_not_the_same_bit_for_bit(family, adapter, dtype, metal, named, monkeypatch):
    model = tiny_family(family)
    model.set_dtype(dtype)
    model = attach(model, adapter)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert unsteady(model) == ""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    found = unsteady(model).split("; ") if named else [unsteady(model)]
    assert len(found) == max(1, len(named))
    assert all(word in what for word, what in zip(named, found, strict=False))
