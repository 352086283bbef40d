"""Convert the arrays that documented functions accept: of NumPy, MLX or a library with the same function names."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..losses import Array
from ..types import Floats


def namespace(array: Array) -> Any:
    """Return the module that ``array`` comes from, numpy, mlx.core, ..., without importing it."""
    module = sys.modules[type(array).__module__]
    if not hasattr(module, "minimum"):
        raise TypeError(f"{array!r} is a {type(array).__name__}; give an array of numpy or mlx")
    return module


def values_of(values: Array) -> Floats:
    """Return a list or an array as NumPy floats, with the precision of a floating-point array kept."""
    if not isinstance(values, list):
        namespace(values)
    array = np.asarray(values)
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def like(given: Array, values: NDArray[Any]) -> Array:
    """Return ``values`` as the kind and precision of ``given``; a list gives a NumPy array."""
    cast = values.astype(values_of(given).dtype)
    return cast if isinstance(given, list) else namespace(given).array(cast)


def refuse_unlike(**arrays: Array) -> None:
    """Raise UserError unless all arrays have the same shape."""
    for array in arrays.values():
        namespace(array)
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name.replace('_', ' ')} {array.shape}" for name, array in arrays.items())
        raise UserError(f"the shapes are {shapes}; give one number per token to each")
