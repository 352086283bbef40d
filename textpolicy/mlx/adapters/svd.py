"""Compute the truncated SVDs of a model's weights once and keep them in the cache."""

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
from .quantised import dense_weight
from .tinylora import Factors, truncated_svd

logger = logging.getLogger(__name__)

SVD_VERSION = 1  # raise it when truncated_svd changes its results, so that cached factors are computed anew


def factorise(modules: Mapping[str, nn.Linear | nn.QuantizedLinear], rank: int) -> dict[str, Factors]:
    """Return the leading ``rank`` singular triplets of each module's weight, from the cache if computed before.

    Raises UserError for a weight that is all zeros or not finite, and for a cache that cannot be written.
    """
    # The file is named by a digest of every stored byte of the weights.
    digest = hashlib.sha256(f"{SVD_VERSION} {rank}".encode())
    for name, module in modules.items():
        for part, array in sorted((k, v) for k, v in module.items() if isinstance(v, mx.array)):
            digest.update(f"{name}.{part} {array.dtype} {array.shape}".encode())
            digest.update(np.array(array.view(mx.uint8), copy=False).data)
    path = cache_folder() / "svd" / f"{digest.hexdigest()[:32]}.safetensors"
    if not path.exists():
        started = time.perf_counter()
        factors = {name: truncated_svd(dense_weight(m), rank) for name, m in modules.items()}
        logger.info("factorised %d weights in %.1f s", len(modules), time.perf_counter() - started)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".svd-", dir=path.parent) as workspace:
                new = Path(workspace) / "factors.safetensors"
                save_arrays(
                    new, {f"{name}.{k}": getattr(f, k) for name, f in factors.items() for k in ("u", "s", "vt")}
                )
                os.replace(new, path)
        except OSError as error:
            raise UserError(
                f"cannot write the factors of the weights to {path.parent} ({error.strerror or error}); "
                "set TEXTPOLICY_CACHE to a folder with room"
            ) from error
    arrays: Any = mx.load(str(path))
    return {name: Factors(*(arrays[f"{name}.{k}"] for k in ("u", "s", "vt"))) for name in modules}
