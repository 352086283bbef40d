"""How the documented functions take arrays of NumPy, MLX or any library that names its functions alike."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..errors import UserError
from ..losses import Array


def namespace(array: Array) -> Any:
    """The module that ``array`` comes from, found through the array and not imported: numpy, mlx.core, ..."""
    module = sys.modules[type(array).__module__]
    if not hasattr(module, "minimum"):
        raise TypeError(f"{array!r} is a {type(array).__name__}; give an array of numpy or mlx")
    return module


def values_of(values: Array) -> np.ndarray:
    """A list or an array as NumPy floats, of its own precision where it has one."""
    if not isinstance(values, list):
        namespace(values)
    array = np.asarray(values)
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def like(given: Array, values: np.ndarray) -> Array:
    """``values`` as the kind and precision of ``given``; a list gives a NumPy array."""
    cast = values.astype(values_of(given).dtype)
    return cast if isinstance(given, list) else namespace(given).array(cast)


def refuse_unlike(**arrays: Array) -> None:
    """A UserError unless all have one shape."""
    for array in arrays.values():
        namespace(array)
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name.replace('_', ' ')} {array.shape}" for name, array in arrays.items())
        raise UserError(f"the shapes are {shapes}; give one number per token to each")
