"""Running sums down an axis that is not the last: against NumPy's, and in the passes of a model with Mamba-2 layers."""

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from architectures import adapted
from mlx_lm.models import falcon_h1, ssm

from textpolicy.mlx.engine import decode_patches, pass_patches
from textpolicy.mlx.kernels import scans
from textpolicy.mlx.kernels.patching import patched
from textpolicy.mlx.kernels.scans import running_sum


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 6, 4), 1), ((3, 6, 4), -2), ((2, 1, 5), 1), ((6, 4), 0), ((2, 3, 4, 5), 1), ((3, 300, 40), 1)],
)
def test_a_running_sum_and_its_gradient_are_those_of_numpy(shape, axis, compiled):
    rng = np.random.default_rng(len(shape))
    array, weights = rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(np.float32)

    def total(a):
        return (running_sum(a, axis) * mx.array(weights)).sum()

    gradient = mx.grad(total)
    found = (mx.compile(gradient) if compiled else gradient)(mx.array(array))
    np.testing.assert_allclose(running_sum(mx.array(array), axis), np.cumsum(array, axis), atol=1e-4)
    np.testing.assert_allclose(found, np.flip(np.cumsum(np.flip(weights, axis), axis), axis), atol=1e-4)


@pytest.mark.parametrize("patches", [pass_patches, decode_patches])
def test_no_pass_on_a_gpu_lets_mlx_sum_down_an_axis_that_is_not_the_last(patches, monkeypatch):
    """Layers with a state take such a sum; the one over pairs of tokens has as many rows as columns, which is safe."""
    asked = []
    monkeypatch.setattr(scans, "running_sum", lambda array, axis: asked.append(array.shape) or mx.cumsum(array, axis))
    monkeypatch.setattr(scans.mx, "default_device", lambda: mx.Device(mx.gpu))
    with patched(adapted("falcon_h1"), {"ssm_update": patches()["ssm_update"]}):
        update, mine = falcon_h1.ssm_update, ssm.mx
        sizes = {"x": (3, 6, 4, 8), "a": (4,), "b": (3, 6, 1, 8), "c": (3, 6, 1, 8), "d": (4,), "dt": (3, 6, 4)}
        inputs = [mx.random.normal(shape) for shape in sizes.values()]
        state = mx.random.normal((3, 4, 8, 8))
        found = update(*inputs, mx.zeros(4), state)
    assert ssm.mx is mine is mx
    assert asked == [(3, 4, 6, 6), (3, 6, 4)]
    monkeypatch.undo()
    for ours, theirs in zip(found, ssm.ssm_update(*inputs, mx.zeros(4), state), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
