"""The state that training changes in an engine, as a safetensors file: parameters, the optimiser, MLX's random key."""

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
    """Write ``arrays`` and JSON ``notes`` into the safetensors file ``path``. Raises OSError."""
    save_arrays(path, arrays, {"notes": json.dumps(dict(notes))})


def read_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Return what ``write_arrays`` wrote. Raises UserError."""
    arrays, metadata = load_arrays(path, "give the file that a run wrote")
    return arrays, json.loads(metadata.get("notes", "{}"))


def training_state(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """Return trainable parameters, the optimiser's state and MLX's random key (2,) uint32, by prefixed names."""
    optimizer.init(model.trainable_parameters())  # leaves existing moments alone
    moments: Any = tree_flatten(optimizer.state)
    weights = {_WEIGHTS + name: value for name, value in trainable(model).items()}
    random: Any = mx.random.state
    return {**weights, **{_OPTIMIZER + name: value for name, value in moments}, _RANDOM: random[0]}


def restore_training_state(
    model: nn.Module, optimizer: optim.Optimizer, arrays: Mapping[str, mx.array], path: Path
) -> None:
    """Restore what ``training_state`` returned; ``path`` is for messages. Raises UserError, changing nothing."""
    expected = training_state(model, optimizer)
    for name in [*arrays, *expected]:
        found, ours = arrays.get(name), expected.get(name)
        if found is None or ours is None:
            misfit = f"{'this model has no' if ours is None else 'it lacks'} {name}"
        elif (found.shape, found.dtype) != (ours.shape, ours.dtype):
            misfit = f"{name} is {found.shape} {found.dtype} and the model's {ours.shape} {ours.dtype}"
        else:
            continue
        raise UserError(
            f"the state in {path} is of another model or optimiser: {misfit}; resume with the run's own settings"
        )
    mx.eval(*arrays.values())
    model.load_weights([(n.removeprefix(_WEIGHTS), a) for n, a in arrays.items() if n.startswith(_WEIGHTS)], False)
    moments = [(n.removeprefix(_OPTIMIZER), a) for n, a in arrays.items() if n.startswith(_OPTIMIZER)]
    optimizer.state = tree_unflatten(moments)
    optimizer.init(model.trainable_parameters())  # frozen blocks have empty places
    high, low = map(int, np.array(arrays[_RANDOM]))
    mx.random.seed(high << 32 | low)  # makes exactly this key of it
