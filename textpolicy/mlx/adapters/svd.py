"""The truncated SVDs of a model's weights, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..._system.cache import cache_folder
from ...errors import UserError
from ..files.safetensors import save_arrays
from .tinylora import Factors, dense_weight, truncated_svd

logger = logging.getLogger(__name__)

SVD_VERSION = 1  # raise it when truncated_svd gives something else, so that cached factors are made anew


def factorise(modules: Mapping[str, nn.Linear | nn.QuantizedLinear], rank: int) -> dict[str, Factors]:
    """The leading ``rank`` singular triplets of the weight of each of the named ``modules``.

    They come from the cache if these weights were factorised before. Raises UserError for a weight that
    is all zeros or not finite, and for a cache that cannot be written.
    """
    path = cache_folder() / "svd" / f"{_digest(modules, rank)}.safetensors"
    if not path.exists():
        started = time.perf_counter()
        factors = {name: truncated_svd(dense_weight(m), rank) for name, m in modules.items()}
        logger.info("factorised %d weights in %.1f s", len(modules), time.perf_counter() - started)
        _keep(factors, path)
    return _read(path, list(modules))


def _digest(modules: Mapping[str, nn.Linear | nn.QuantizedLinear], rank: int) -> str:
    """Of every byte of the weights, as they are stored."""
    digest = hashlib.sha256(f"{SVD_VERSION} {rank}".encode())
    for name, module in modules.items():
        for part, array in sorted((k, v) for k, v in module.items() if isinstance(v, mx.array)):
            digest.update(f"{name}.{part} {array.dtype} {array.shape}".encode())
            digest.update(np.array(array.view(mx.uint8), copy=False).data)
    return digest.hexdigest()[:32]


def _keep(factors: Mapping[str, Factors], path: Path) -> None:
    """Written beside ``path``, then renamed: whole or not at all."""
    arrays = {f"{name}.{k}": getattr(f, k) for name, f in factors.items() for k in ("u", "s", "vt")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".svd-", dir=path.parent) as workspace:
            new = Path(workspace) / "factors.safetensors"
            save_arrays(new, arrays)
            os.replace(new, path)
    except OSError as error:
        raise UserError(
            f"cannot keep the factors of the weights in {path.parent} ({error.strerror or error}); "
            "set TEXTPOLICY_CACHE to a folder with room"
        ) from error


def _read(path: Path, names: list[str]) -> dict[str, Factors]:
    arrays: Any = mx.load(str(path))
    return {name: Factors(*(arrays[f"{name}.{k}"] for k in ("u", "s", "vt"))) for name in names}
