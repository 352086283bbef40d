"""The limits that a run sets on Metal are legal on every Mac, and contexts grow by as little as it needs."""

import sys
from contextlib import nullcontext

import mlx.core as mx
import pytest
from conftest import tiny_llama
from pretended_metal import MACS, metal, pretended_metal  # noqa: F401 (metal is a fixture)

from textpolicy.mlx.memory import limit_memory, usable_memory
from textpolicy.mlx.read.context import Attention, Context, members

SIZES = [None] if sys.platform == "darwin" else list(MACS)  # in GB; None: of this Mac


@pytest.mark.parametrize("share", [None, 0.05, 0.5, 0.95, 1.0, 4.0])
@pytest.mark.parametrize("size", SIZES)
def test_the_limits_of_a_run_are_legal_and_leave_the_machine_the_rest(size, share, monkeypatch):
    with nullcontext() if size is None else pretended_metal(size):
        info, refuse, given = mx.device_info(), mx.set_wired_limit, {}
        whole, working = info["memory_size"], info["max_recommended_working_set_size"]
        monkeypatch.setattr(mx, "set_memory_limit", lambda limit: given.update(memory=limit))
        monkeypatch.setattr(mx, "set_cache_limit", lambda limit: given.update(cache=limit))
        monkeypatch.setattr(mx, "set_wired_limit", lambda limit: given.update(wired=limit) or refuse(limit))
        budget = limit_memory(share and share * whole)
        monkeypatch.undo()
        assert budget == (share * whole if share else usable_memory())
        assert given == {
            "memory": int(budget),  # at which MLX waits, and frees the buffers that it kept
            "cache": int(budget / 4),
            "wired": int(min(budget, working)),
        }
        assert 0.55 * whole < usable_memory() <= 0.9 * working < whole


@pytest.mark.parametrize("completion", [1, 40, 58, 59, 63, 64, 65, 200, 500])
def test_the_slots_of_a_context_are_blocks_of_64(completion):
    model = tiny_llama(60)
    context = Context(model, spare=min(64, completion))
    for n in (5, *[1] * completion):
        context.read(model, mx.zeros((1, n), mx.int32))
    [slots] = {layer.keys.shape[2] for layer in members(context.layers) if isinstance(layer, Attention)}
    assert slots % 64 == 0
    assert 5 + completion <= slots < 5 + completion + 128
