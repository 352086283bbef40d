"""Compute digests of a model's folder, part by part, by which a run that resumes knows its base again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from ..._system.files import is_litter
from .folder import weight_files
from .tokenizer import read_json

WHOLE = 2**30  # bytes of weights up to which every one is read: about a second
_BLOCK = 2**16  # bytes; of larger weights such blocks are read, evenly spread over every tensor
_FREE = ("transformers_version", "_name_or_path")  # entries that nothing is computed from
_TOKENIZER = ("tokenizer.json", "*.model", "vocab*", "merges.txt", "*.tiktoken", "*tokens*.json", "*tokeni*.py")


def identity(folder: Path) -> dict[str, str]:
    """Return a digest of config, tokenizer, chat template and weights of the model in ``folder``, by their names.

    That of the weights covers all bytes up to ``WHOLE``; of larger ones headers and a share of every tensor, so that
    other training of the same model shows and a single number need not. Raises UserError and OSError.
    """
    found = {path for pattern in ("*", "*/*.jinja") for path in folder.glob(pattern) if path.is_file()}
    files = sorted(path for path in found if not is_litter(path))
    return dict(_identity(folder, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)))


@lru_cache(maxsize=4)
def _identity(folder: Path, files: tuple[tuple[Any, ...], ...]) -> dict[str, str]:
    def settings(name: str) -> dict[str, Any]:
        values = read_json(folder / name) if (folder / name).is_file() else {}
        return {key: value for key, value in values.items() if key not in _FREE}

    tokenizer = settings("tokenizer_config.json")
    templates = [tokenizer.pop("chat_template", None), settings("chat_template.json").get("chat_template")]
    templates += [path.read_bytes().hex() for path, *_ in files if path.suffix == ".jinja"]
    named = sorted({path for pattern in _TOKENIZER for path in folder.glob(pattern) if not is_litter(path)})
    read = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in named}
    return {
        "config": _digest([settings("config.json"), settings("generation_config.json")]),
        "tokenizer": _digest([tokenizer, read]),
        "chat template": _digest([template for template in templates if template]),
        "weights": _weights(weight_files(folder)),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _weights(files: Sequence[Path]) -> str:
    share = WHOLE / max(1, sum(path.stat().st_size for path in files))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            if share >= 1:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                for block in _blocks(file, share):
                    digest.update(block)
    return digest.hexdigest()[:16]


def _blocks(file: BinaryIO, share: float) -> Iterator[bytes]:
    """Yield the header of a safetensors file and ``share`` of each tensor's bytes, its first and last among them."""
    size = file.read(8)
    yield (header := file.read(int.from_bytes(size, "little")))
    tensors = json.loads(header)
    tensors.pop("__metadata__", None)
    for _, tensor in sorted(tensors.items()):
        start, stop = (8 + len(header) + offset for offset in tensor["data_offsets"])
        count = max(2, round(share * (stop - start) / _BLOCK))
        for i in range(count):
            file.seek(start + max(0, stop - start - _BLOCK) * i // (count - 1))
            yield file.read(min(_BLOCK, stop - start))
