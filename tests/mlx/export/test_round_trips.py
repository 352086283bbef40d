"""What an export writes is read again, whichever tool the tokenizer came from."""

import json

import pytest
from made_gguf import LETTERS, VOCAB, write

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from textpolicy.errors import UserError
from textpolicy.mlx.export import export_folder, export_gguf
from textpolicy.mlx.files.gguf import convert
from textpolicy.mlx.models import load_model

TEXT = "<|start|>hello, 12 Grüße!<tool>\n\n你好<|end|>"


@pytest.fixture
def folder(tmp_path):
    convert(write(tmp_path / "m.gguf"), tmp_path / "base")
    return tmp_path / "base"


def exported(folder, out, to="gguf"):
    model, tokenizer = load_model(folder)
    if to == "gguf":
        export_gguf(model, tokenizer, folder, out)
    else:
        export_folder(model, folder, out, layout=to)
    return tokenizer, load_model(out)[1]


def with_tokenizer(folder, merges=(), words=(), add=()):
    """Replace the folder's tokenizer by a byte-level BPE without more than is given."""
    names = ["<|end|>", "<|start|>", "<tool>", *LETTERS, *words]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|end|>", "<|start|>", *add)]
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    assert tokenizer.get_vocab_size() <= VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("to", ["gguf", "mlx", "hf"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"merges": [("h", "e")], "words": ["he"]},
        {"add": ["<|call|>", "<|im_end|>"]},
        {"merges": [("h", "e"), ("l", "l"), ("he", "ll")], "words": ["he", "ll", "hell"], "add": ["<|x|>"]},
    ],
    ids=["letters alone", "one merge", "added tokens", "several merges"],
)
def test_tokenizers_of_any_size_come_back(folder, tmp_path, how, to):
    with_tokenizer(folder, **how)
    before, after = exported(folder, tmp_path / ("out.gguf" if to == "gguf" else "out"), to)
    text = TEXT + "".join(how.get("add", ()))
    assert after.encode(text) == before.encode(text)
    assert after.decode(after.encode(TEXT)) == before.decode(before.encode(TEXT)) == TEXT
    assert set(after.eos_token_ids) == set(before.eos_token_ids)


DEFAULT = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


def with_templates(folder, templates):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = templates
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("names", [["tool_use"], ["tool_use", "rag", "über uns"]])
def test_of_several_chat_templates_the_default_is_what_gguf_gives_back(folder, tmp_path, names):
    with_templates(folder, {"default": DEFAULT} | {name: f"{{{{ '{name}' }}}}" for name in names})
    before, after = exported(folder, tmp_path / "out.gguf")
    assert isinstance(before.chat_template, dict)
    assert after.chat_template == DEFAULT
    messages = [{"role": "user", "content": "hello"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)


def test_several_chat_templates_without_a_default_are_refused(folder, tmp_path):
    with_templates(folder, {"rag": DEFAULT, "tool_use": "{{ 'tools' }}"})
    model, tokenizer = load_model(folder)
    with pytest.raises(UserError, match="has the chat templates rag, tool_use and no default; name one default"):
        export_gguf(model, tokenizer, folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_tokenizer_without_an_end_is_refused_by_gguf(folder, tmp_path):
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "eos_token": None}))
    model, tokenizer = load_model(folder)
    with pytest.raises(UserError, match="the tokenizer has no eos_token, which GGUF needs"):
        export_gguf(model, tokenizer, folder, tmp_path / "out.gguf")
