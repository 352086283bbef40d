"""A Hugging Face tokenizer rebuilt from the metadata of a GGUF file (byte-level BPE only)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ...errors import UserError

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class TokenizerData:
    """What a GGUF file says about its tokenizer."""

    tokens: tuple[str, ...]  # by id, in byte-level letters
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
    """The word pattern of Llama 3 and Qwen 2, which differ in how many digits go together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)])


# The names that llama.cpp gives in tokenizer.ggml.pre; "default" also stands for files that name none.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm,
    "gpt-2": lambda: _byte_level(use_regex=True),
    "default": lambda: _byte_level(use_regex=True),
    "llama-bpe": lambda: _split(_words(r"\p{N}{1,3}")),
    "qwen2": lambda: _split(_words(r"\p{N}")),
}


def build_tokenizer(data: TokenizerData) -> Tokenizer:
    """The tokenizer as the ``tokenizers`` library runs it."""
    if data.pre_tokenizer not in PRE_TOKENIZERS:
        raise UserError(
            f"the pre-tokenizer {data.pre_tokenizer!r} of this GGUF file is not known "
            f"(known: {', '.join(PRE_TOKENIZERS)}); use the model's Hugging Face folder instead"
        )
    tokenizer = Tokenizer(_bpe(data))
    if data.pre_tokenizer == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[data.pre_tokenizer]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(data)
    tokenizer.add_tokens(_added_tokens(data))
    return tokenizer


def _bpe(data: TokenizerData) -> models.BPE:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in data.merges)]
    if any(not right or " " in right for _, right in pairs):
        raise UserError("the merges of this GGUF file hold an entry that is not a pair; download it again")
    vocabulary = {token: i for i, token in enumerate(data.tokens)}
    try:
        # Llama 3 takes a whole word that is in the vocabulary before it looks at the merges
        return models.BPE(vocabulary, pairs, ignore_merges=data.pre_tokenizer == "llama-bpe")
    except Exception as error:  # the class that tokenizers raises; nothing narrower exists
        raise UserError(f"the merges of this GGUF file do not fit its tokens ({error}); download it again") from error


def _added_tokens(data: TokenizerData) -> list[AddedToken]:
    """Control tokens are special; user-defined ones are kept whole, and shown when decoding."""
    return [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(data.tokens, data.token_types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]


def _post_processor(data: TokenizerData) -> processors.PostProcessor:
    bytes_only = processors.ByteLevel(trim_offsets=False)
    if not data.add_bos or data.bos is None:
        return bytes_only
    bos = data.tokens[data.bos]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, data.bos)]
    )
    return processors.Sequence([bytes_only, template])


def save_tokenizer(data: TokenizerData, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and its companions, so that ``AutoTokenizer`` loads them from ``folder``."""
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
