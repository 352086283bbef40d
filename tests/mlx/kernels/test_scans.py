"""Running sums along an axis of one element, which are not left to MLX on a GPU."""

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from architectures import adapted
from mlx_lm.models import falcon_h1, ssm

from textpolicy.mlx.engine import decode_patches, pass_patches
from textpolicy.mlx.kernels.patching import patched
from textpolicy.mlx.kernels.scans import running_sum


@pytest.mark.parametrize(("shape", "axis"), [((3, 6, 4), 1), ((1, 1, 5), 1), ((1, 4), 0), ((2, 3, 1, 1), -2)])
def test_a_running_sum_is_that_of_numpy(shape, axis):
    array = np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(running_sum(mx.array(array), axis), np.cumsum(array, axis), atol=1e-6)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("patches", [pass_patches, decode_patches])
def test_no_pass_on_a_gpu_lets_mlx_sum_along_an_axis_of_one_element(patches, length, monkeypatch):
    """A layer that goes on from a state takes two sums, over pairs of its tokens and over tokens."""
    model, summed, mine = adapted("falcon_h1"), [], mx.cumsum
    shapes = [(1, length, 4, 8), (4,), (1, length, 1, 8), (1, length, 1, 8), (4,), (1, length, 4), (4,), (1, 4, 8, 8)]
    inputs = [mx.random.normal(shape) for shape in shapes]
    expected = ssm.ssm_update(*inputs)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    replaced = patches()
    monkeypatch.undo()
    monkeypatch.setattr(mx, "cumsum", lambda array, axis: summed.append(array.shape[axis]) or mine(array, axis=axis))
    with patched(model, {"ssm_update": replaced["ssm_update"]}):
        found = falcon_h1.ssm_update(*inputs)
    assert ssm.mx is mx
    assert summed == ([] if length == 1 else [length, length])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
