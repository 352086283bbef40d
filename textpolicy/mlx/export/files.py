"""The parts common to exports: atomic writing, the base's config, dtypes by name, supported layouts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import UserError

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# model_type of the models whose weights have the same names and shapes in mlx-lm and Hugging Face
HF_LAYOUT = (
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which is renamed to ``path`` at the end, or deleted on an error."""
    if path.exists():
        raise UserError(f"{path} exists; choose another --out or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as workspace:
            new = Path(workspace) / path.name
            yield new
            new.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); choose another --out") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model's folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write ``values`` as indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def cast(name: str, weight: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return the array of the weight ``name`` in ``dtype``. Raises UserError for a finite value that it cannot hold."""
    found = weight.astype(dtype)
    lost = np.array(mx.where(mx.isinf(found) & mx.isfinite(weight), mx.abs(weight), 0).max())
    if lost > 0:
        short = next(name for name, known in DTYPES.items() if known == dtype)
        raise UserError(
            f"the weight {name!r} has a value of {lost:g}, which {short} cannot hold; "
            "export with --dtype bfloat16 or float32"
        )
    return found


def check_layout(config: dict[str, Any], target: str) -> None:
    """Raise UserError unless mlx-lm and transformers keep the model's weights alike."""
    if config["model_type"] not in HF_LAYOUT:
        raise UserError(
            f"the model is of type {config['model_type']!r}, whose weights mlx-lm may store in its own layout, and "
            f"--to {target} supports {', '.join(HF_LAYOUT)}; use --to mlx"
        )
