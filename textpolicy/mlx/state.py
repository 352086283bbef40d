"""What training changes in an engine, as one safetensors file: trained parameters, the optimiser, MLX's random key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import UserError
from .adapters.attach import trainable
from .files.safetensors import load_arrays, save_arrays

_WEIGHTS, _OPTIMIZER, _RANDOM = "weights.", "optimizer.", "random"


def write_arrays(path: Path, arrays: Mapping[str, mx.array], notes: Mapping[str, Any]) -> None:
    """``arrays`` and JSON ``notes`` as the safetensors file ``path``. Raises OSError."""
    save_arrays(path, arrays, {"notes": json.dumps(dict(notes))})


def read_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """What ``write_arrays`` wrote. Raises UserError."""
    arrays, metadata = load_arrays(path, "give the file that a run wrote")
    return arrays, json.loads(metadata.get("notes", "{}"))


def training_state(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """Trained parameters, the optimiser's state and the random key, by names that say which."""
    optimizer.init(model.trainable_parameters())  # does nothing to moments that are there
    moments: Any = tree_flatten(optimizer.state)
    weights = {_WEIGHTS + name: value for name, value in trainable(model).items()}
    return {**weights, **{_OPTIMIZER + name: value for name, value in moments}, _RANDOM: _random_key()}


def restore_training_state(
    model: nn.Module, optimizer: optim.Optimizer, arrays: Mapping[str, mx.array], path: Path
) -> None:
    """Become what ``training_state`` described; ``path`` is where it comes from. Raises UserError, changing nothing."""
    wanted = training_state(model, optimizer)
    for name in [*arrays, *wanted]:
        if name not in wanted or name not in arrays:
            raise _misfit(path, f"{'this model has no' if name not in wanted else 'it lacks'} {name}")
        found, here = arrays[name], wanted[name]
        if (found.shape, found.dtype) != (here.shape, here.dtype):
            raise _misfit(path, f"{name} is {found.shape} {found.dtype} and the model's {here.shape} {here.dtype}")
    mx.eval(*arrays.values())
    model.load_weights([(n.removeprefix(_WEIGHTS), a) for n, a in arrays.items() if n.startswith(_WEIGHTS)], False)
    moments = [(n.removeprefix(_OPTIMIZER), a) for n, a in arrays.items() if n.startswith(_OPTIMIZER)]
    optimizer.state = tree_unflatten(moments)
    optimizer.init(model.trainable_parameters())  # blocks that do not train have empty places
    high, low = map(int, np.array(arrays[_RANDOM]))
    mx.random.seed(high << 32 | low)  # makes just this key of it


def _random_key() -> mx.array:
    """(2,) uint32, from which MLX draws next."""
    state: Any = mx.random.state
    return state[0]


def _misfit(path: Path, what: str) -> UserError:
    return UserError(f"the state in {path} is of another model or optimiser: {what}; go on with the run's own settings")
