"""What every export needs: writing whole or not at all, the base's config, dtypes by name, known layouts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import UserError

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# model_type of the models whose weights mlx-lm keeps under Hugging Face's names and in its shapes
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
    """A place beside ``path`` to write a file or folder to; it becomes ``path`` at the end, or nothing is left."""
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
    """The config.json of a model's folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_json(values: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_layout(config: dict[str, Any], target: str) -> None:
    """Raise UserError unless the model's parts have the same names in mlx-lm and in transformers."""
    if config["model_type"] not in HF_LAYOUT:
        raise UserError(
            f"the model is of type {config['model_type']!r}, whose weights mlx-lm may keep in a layout of its own, and "
            f"--to {target} knows {', '.join(HF_LAYOUT)}; use --to mlx"
        )
