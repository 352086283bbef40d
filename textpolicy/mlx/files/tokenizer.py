"""Rebuild a Hugging Face tokenizer from the metadata of a GGUF file: byte-level BPE, or SentencePiece's BPE."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ...engine import stop_tokens
from ...errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of tokenizer.ggml.token_type
_SPACE = "\u2581"  # SentencePiece's


@dataclass(frozen=True)
class TokenizerData:
    """The tokenizer in the metadata of a GGUF file."""

    tokens: tuple[str, ...]  # by id, in the byte-level alphabet or, with scores, in SentencePiece's
    token_types: tuple[int, ...]  # by id
    merges: tuple[str, ...]  # "left right", best first
    pre_tokenizer: str
    eos: int
    bos: int | None = None
    unknown: int | None = None
    padding: int | None = None
    add_bos: bool = False
    chat_template: str | dict[str, str] | None = None  # several by name, with "default"
    stops: tuple[int, ...] = ()  # further tokens that end a completion
    scores: tuple[float, ...] | None = None  # by id, of SentencePiece: the best pair of pieces is joined first
    add_space: bool = True  # SentencePiece: before a text


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, _byte_level(use_regex=False)])


def _words(digits: str) -> str:
    """Return the word pattern of Llama 3 and Qwen 2, which differ in how they group digits."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# The names that llama.cpp gives in tokenizer.ggml.pre; "default" is also used for files without one.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]
    ),
    "gpt-2": lambda: _byte_level(use_regex=True),
    "default": lambda: _byte_level(use_regex=True),
    "llama-bpe": lambda: _split(_words(r"\p{N}{1,3}")),
    "qwen2": lambda: _split(_words(r"\p{N}")),
}


def build_tokenizer(data: TokenizerData) -> Tokenizer:
    """Return the tokenizer of the ``tokenizers`` library. Raises UserError if it is unknown or damaged."""
    tokenizer = _byte_level_bpe(data) if data.scores is None else _sentencepiece(data)
    if data.add_bos and data.bos is not None:
        bos = data.tokens[data.bos]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, data.bos)]
        )
        before = tokenizer.post_processor
        tokenizer.post_processor = template if before is None else processors.Sequence([before, template])
    # Control tokens are special; user-defined ones are kept whole, and shown when decoding.
    spaced = data.scores is not None and not data.add_space  # found in the text as SentencePiece sees it
    tokenizer.add_tokens(
        [
            AddedToken(_spelled(token, data), special=kind != USER_DEFINED, normalized=spaced and kind == USER_DEFINED)
            for token, kind in zip(data.tokens, data.token_types, strict=True)
            if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and data.scores is not None)
        ]
    )
    return tokenizer


def _byte_level_bpe(data: TokenizerData) -> Tokenizer:
    if data.pre_tokenizer not in PRE_TOKENIZERS:
        raise UserError(
            f"the pre-tokenizer {data.pre_tokenizer!r} of this GGUF file is not known "
            f"(known: {', '.join(PRE_TOKENIZERS)}); use the model's Hugging Face folder instead"
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in data.merges)]
    if any(not right or " " in right for _, right in pairs):
        raise UserError("the merges of this GGUF file include an entry that is not a pair; download it again")
    vocabulary = {token: i for i, token in enumerate(data.tokens)}
    try:
        # Llama 3 prefers a whole word in the vocabulary to the merges.
        bpe = models.BPE(vocabulary, pairs, ignore_merges=data.pre_tokenizer == "llama-bpe")
    except Exception as error:  # the class that tokenizers raises; nothing narrower exists
        raise UserError(f"the merges of this GGUF file do not fit its tokens ({error}); download it again") from error
    tokenizer = Tokenizer(bpe)
    if data.pre_tokenizer == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[data.pre_tokenizer]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece(data: TokenizerData) -> Tokenizer:
    """Return SentencePiece's BPE: a text is one word, and the pair that makes the piece of the best score is joined."""
    assert data.scores is not None
    vocabulary = {_spelled(token, data): i for i, token in enumerate(data.tokens)}
    words = {t for t, kind in zip(vocabulary, data.token_types, strict=False) if kind == NORMAL}
    if len(vocabulary) != len(data.tokens):
        raise UserError("two tokens of this GGUF file differ in the letter for a space alone; download it again")
    ranked = []
    for word in words:
        score = data.scores[vocabulary[word]]
        for i in range(1, len(word)):
            left, right = word[:i], word[i:]
            if left in words and right in words:
                ranked.append((-score, len(left), left, right))
    unknown = None if data.unknown is None else data.tokens[data.unknown]
    merges = [(left, right) for _, _, left, right in sorted(ranked)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if data.add_space else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if data.add_space else [])])
    return tokenizer


def _spelled(token: str, data: TokenizerData) -> str:
    """Return a token as it is in the vocabulary: llama.cpp writes SentencePiece's own symbols with plain spaces."""
    return token.replace(" ", _SPACE) if data.scores is not None and not data.add_space else token


def stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Return every id that ends a completion of the model in ``folder``, in order.

    They are the eos_token_id of config.json and generation_config.json, and those of the tokenizer. Raises UserError
    for an eos_token_id that is no id.
    """
    found = set(stop_tokens(tokenizer, needed=False))
    for path in (folder / "config.json", folder / "generation_config.json"):
        values = read_json(path) if path.is_file() else {}
        for table in (values, values.get("text_config") or {}):
            given = table.get("eos_token_id")
            ids = given if isinstance(given, list) else [] if given is None else [given]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise UserError(f"{path} has {given!r:.60} for eos_token_id; set it to a token id, or a list of them")
            found |= set(ids)
    return sorted(found)


def read_json(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file. Raises UserError if it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({' '.join(str(error).split())}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} contains a {type(values).__name__}, not a table of settings; download it again")
    return values


def save_tokenizer(data: TokenizerData, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and the files beside it, which ``AutoTokenizer`` loads from ``folder``."""
    import mlx_lm  # noqa: F401 - before transformers, whose advice to install PyTorch it silences
    from transformers import PreTrainedTokenizerFast

    named = {"eos": data.eos, "bos": data.bos, "unk": data.unknown, "pad": data.padding}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(data),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": data.tokens[i] for name, i in named.items() if i is not None},
    )
    tokenizer.chat_template = data.chat_template
    tokenizer.save_pretrained(folder)
