"""SentencePiece vocabularies of GGUF files give the ids of the sentencepiece library."""

import io
import random

import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protobuf

from textpolicy.errors import UserError
from textpolicy.mlx.files.tokenizer import TokenizerData, build_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog says: 12 + 30 = 42!",
    "Grüße aus Köln; naïve café, déjà vu. Привет, мир! 你好\uff0c世界。",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)",
    "the theory of the thing that then thought itself through and through",
]
SAMPLES = [
    "",
    " ",
    "  two  spaces   three ",
    "\n\n\ttabs\r\n",
    "the\u2581dog \u2581 and",
    "🙂 ½ Ⅷ \u00e9 e\u0301 \U00010348 \x00\x07",
    "<0x41> <s> </s> <unk> <pad>",
    "<tool>the<tool> fox</tool>  <tool>",
    "=====the==",
    "2024 is 1234567.89",
    *CORPUS,
]


def trained(add_dummy_prefix, **settings):
    """A model of the sentencepiece library, and the same as a GGUF file describes it."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=out,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    proto = protobuf.ModelProto()
    proto.ParseFromString(out.getvalue())
    oracle = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    user = {p.piece for p in proto.pieces if p.type == 4}
    data = TokenizerData(
        tokens=tuple(p.piece.replace("\u2581", " ") if p.piece in user else p.piece for p in proto.pieces),
        token_types=tuple(p.type for p in proto.pieces),
        merges=(),
        pre_tokenizer="default",
        eos=oracle.eos_id(),
        bos=oracle.bos_id(),
        unknown=oracle.unk_id(),
        add_bos=True,
        scores=tuple(p.score for p in proto.pieces),
        add_space=add_dummy_prefix,
    )
    return oracle, data


def texts():
    rng, letters = random.Random(0), [*"".join(SAMPLES), *"   \n"]
    return SAMPLES + ["".join(rng.choice(letters) for _ in range(rng.randint(1, 60))) for _ in range(300)]


@pytest.mark.parametrize(
    "settings",
    [
        {"add_dummy_prefix": True},
        {"add_dummy_prefix": False},
        {
            "add_dummy_prefix": False,
            "user_defined_symbols": ["<tool>", "</tool>", "\u2581\u2581", "\u2581\u2581\u2581", "=="],
        },
        {"add_dummy_prefix": False, "split_by_whitespace": False, "split_digits": True},
    ],
)
def test_ids_and_texts_are_those_of_the_library(settings):
    oracle, data = trained(**settings)
    tokenizer = build_tokenizer(data)
    plain = [t for t in texts() if not any(name in t for name in ("<s>", "</s>", "<unk>"))]  # control tokens are ours
    for text in plain:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == oracle.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids), text


def test_control_tokens_are_found_in_a_text_and_a_beginning_is_added():
    _, data = trained(add_dummy_prefix=True)
    tokenizer = build_tokenizer(data)
    ids = tokenizer.encode("the<s>fox</s>").ids
    assert ids[0] == data.bos
    assert ids[-1] == data.eos
    assert ids.count(data.bos) == 2
    assert tokenizer.decode(ids) == "the fox"  # each part of a text gets its space, as in llama.cpp


def test_two_spellings_of_one_piece_are_refused():
    _, data = trained(add_dummy_prefix=False)
    both = TokenizerData(**{**vars(data), "tokens": (" the", *data.tokens[1:])})
    assert "\u2581the" in both.tokens
    with pytest.raises(UserError, match="differ in the letter for a space alone"):
        build_tokenizer(both)
