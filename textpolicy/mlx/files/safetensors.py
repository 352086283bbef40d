"""Read untrusted safetensors files, whose header is checked against the file before MLX reads it, and write others."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ...errors import UserError


def load_arrays(path: Path, advice: str) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the arrays and the metadata of the file ``path``. Raises UserError, which ends with ``advice``."""
    check_safetensors(path, advice)
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a valid safetensors file ({error}); {advice}") from error
    return loaded


def check_safetensors(path: Path, advice: str) -> list[str]:
    """Return the names of the tensors in the file ``path``, after checking that shapes, offsets and size agree.

    Raises UserError, which ends with ``advice``, if they do not.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a valid safetensors file ({error}); {advice}") from error


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write the safetensors file ``path``. Raises OSError."""
    try:
        mx.save_safetensors(str(path), dict(arrays), metadata=dict(metadata or {}))
    except RuntimeError as error:  # mlx does not say why; a full disk is the usual reason
        full = os.statvfs(path.parent).f_bavail == 0
        raise OSError(errno.ENOSPC if full else errno.EIO, f"{error}", str(path)) from error
