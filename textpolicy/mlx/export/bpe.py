"""Read GGUF's description of a tokenizer from a Hugging Face tokenizer.json (byte-level BPE only)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...engine import stop_tokens
from ...errors import UserError
from ..files.tokenizer import CONTROL, NORMAL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, TokenizerData, build_tokenizer

# A text on which pre-tokenizers differ: digits, contractions, blank lines, other scripts, a combining accent
SAMPLE = (
    "Hello  world, it's 2024! I'LL pay $1234567.89\n\n\t ok?  \r\n naïve cafe\u0301 Ⅷ ½ привет 你好\uff0c世界 "
    "مرحبا १२३ 🙂🙂 foo_bar(x) == 3.14e-10;   \n\n\n   end's "
)


def read_byte_level(folder: Path) -> dict[str, Any]:
    """Return the tokenizer.json of ``folder``. Raises UserError unless it is a byte-level BPE."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json, which --to gguf reads; use --to mlx or hf")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["model"]["type"] != "BPE" or values["model"].get("byte_fallback"):
        raise UserError(f"{path} is not a byte-level BPE, the only kind --to gguf writes; use --to mlx or hf")
    return values


def read_bpe(folder: Path, tokenizer: Any, size: int) -> TokenizerData:
    """Return the tokenizer in ``folder`` with ``size`` tokens; the model's tokens beyond its vocabulary are unused.

    ``tokenizer`` is the same one as returned by ``load_model``. Raises UserError unless it is a byte-level BPE with at
    most ``size`` tokens that splits and encodes a sample text like one of the pre-tokenizers that GGUF can name.
    """
    path, values = folder / "tokenizer.json", read_byte_level(folder)
    model = values["model"]
    vocabulary, added = model["vocab"], values.get("added_tokens", [])
    last = max([*vocabulary.values(), *(entry["id"] for entry in added)])
    if last >= size:
        raise UserError(f"the tokenizer has the token {last} and the model only {size} tokens; use its own tokenizer")
    tokens = [f"[PAD{i}]" for i in range(size)]  # llama.cpp's names for unused tokens
    types = [UNUSED] * size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for entry in added:
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"the tokenizer has the chat templates {', '.join(sorted(templates))} and no default; name one default"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token, which GGUF needs; set it in tokenizer_config.json")
    data = TokenizerData(
        tokens=tuple(tokens),
        token_types=tuple(types),
        merges=tuple(merges),
        pre_tokenizer="",
        eos=tokenizer.eos_token_id,
        bos=tokenizer.bos_token_id,
        unknown=tokenizer.unk_token_id,
        padding=tokenizer.pad_token_id,
        add_bos=tokenizer.encode("a")[:1] == [tokenizer.bos_token_id],
        chat_template=templates,
        stops=tuple(sorted(stop_tokens(tokenizer) - {tokenizer.eos_token_id})),
    )
    # GGUF gives the pre-tokenizer by name: find the first one that encodes as the original does.
    original = Tokenizer.from_file(str(path))
    pieces = None if original.pre_tokenizer is None else original.pre_tokenizer.pre_tokenize_str(SAMPLE)
    wanted = original.encode(SAMPLE).ids
    for name, make in PRE_TOKENIZERS.items():
        named = replace(data, pre_tokenizer=name)
        if make().pre_tokenize_str(SAMPLE) == pieces and build_tokenizer(named).encode(SAMPLE).ids == wanted:
            return named
    raise UserError(
        f"{path} splits text like none of GGUF's {', '.join(PRE_TOKENIZERS)}, so --to gguf cannot name it; "
        "use --to mlx or hf"
    )
