"""The files of a folder that make a model: its weights, by the index, and the companions that go along with a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..._system.files import is_litter
from ...errors import UserError
from .safetensors import check_safetensors

INDEX = "model.safetensors.index.json"

# What transformers, mlx-lm and their like read beside config and weights, and what people read
COMPANIONS = (
    "tokenizer*.json",
    "tokenizer*.model*",
    "chat_template*",
    "additional_chat_templates",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of the model in ``folder``: those of its index, or all model*.safetensors.

    An index none of whose files is there is left over from another copy and does not count. Raises UserError if some
    of its files are there and others are not, or if there are no weights.
    """
    index, named = folder / INDEX, list[Path]()
    if index.is_file():
        named = sorted({folder / name for name in _named(index)})
    missing = [file.name for file in named if not file.is_file()]
    if len(missing) < len(named):
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} names; download the weights again")
        return named
    found = sorted(folder.glob("model*.safetensors"))
    if not found:
        raise UserError(f"{folder} has no model*.safetensors; download the weights or convert them first")
    return found


def _named(index: Path) -> list[str]:
    """Return the names of files in an index."""
    try:
        table: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError("it names files that are not .safetensors beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of weights ({error}); download it again") from error
    return names


def tensor_names(files: list[Path]) -> set[str]:
    """Return the names of the tensors in ``files``. Raises UserError for a bad file or a name in two of them."""
    holder: dict[str, Path] = {}
    for file in files:
        for name in check_safetensors(file, "download it again"):
            if name in holder:
                raise UserError(
                    f"in {file.parent} both {holder[name].name} and {file.name} have the tensor {name!r}; remove the "
                    "file that is left over"
                )
            holder[name] = file
    return set(holder)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what goes along with a model: tokenizer, chat templates, code and licence, in files and folders."""
    for path in sorted({p for pattern in COMPANIONS for p in source.glob(pattern) if not is_litter(p)}):
        if path.is_dir():
            litter = lambda _, names: [name for name in names if is_litter(Path(name))]  # noqa: E731
            shutil.copytree(path, target / path.name, ignore=litter)
        else:
            shutil.copyfile(path, target / path.name)
