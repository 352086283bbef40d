"""Rebuild a Hugging Face tokenizer from the metadata of a GGUF file (byte-level BPE only)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ...errors import UserError

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class TokenizerData:
    """The tokenizer in the metadata of a GGUF file."""

    tokens: tuple[str, ...]  # by id, in the byte-level alphabet
    token_types: tuple[int, ...]  # by id
    merges: tuple[str, ...]  # "left right", best first
    pre_tokenizer: str
    eos: int
    bos: int | None = None
    unknown: int | None = None
    padding: int | None = None
    add_bos: bool = False
    chat_template: str | None = None


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
    bytes_only = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = bytes_only
    if data.add_bos and data.bos is not None:
        bos = data.tokens[data.bos]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, data.bos)]
        )
        tokenizer.post_processor = processors.Sequence([bytes_only, template])
    # Control tokens are special; user-defined ones are kept whole, and shown when decoding.
    added = [
        (t, kind) for t, kind in zip(data.tokens, data.token_types, strict=True) if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in added])
    return tokenizer


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
