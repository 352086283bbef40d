"""One set of tokens that end a completion, whichever file of a model names them, and wherever the model goes."""

import json

import pytest
from made_gguf import write
from transformers import AutoTokenizer

from textpolicy.engine import stop_tokens
from textpolicy.environment.text.conversation import ChatCodec
from textpolicy.errors import UserError
from textpolicy.generation import create_policy, generate_tokens
from textpolicy.mlx.export import export_folder, export_gguf
from textpolicy.mlx.files.gguf import convert
from textpolicy.mlx.models import load_model

END, START, TOOL, LETTER = 0, 1, 2, 40  # ids of made_gguf


@pytest.fixture
def folder(tmp_path):
    convert(write(tmp_path / "m.gguf", tokenizer__chat_template=None), tmp_path / "base")
    return tmp_path / "base"


def says(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({"eos_token_id": 0}, {}, {0}),
        ({"eos_token_id": [TOOL, LETTER]}, {"eos_token_id": START}, {END, START, TOOL, LETTER}),
        ({"eos_token_id": START}, {"eos_token_id": 0}, {END, START}),  # 0 is an id like any other
        ({"eos_token_id": None}, {"eos_token_id": [LETTER]}, {END, LETTER}),
        ({"eos_token_id": START, "text_config": {"eos_token_id": [TOOL]}}, {}, {END, START, TOOL}),
        ({"eos_token_id": []}, {"eos_token_id": None, "temperature": 0.6}, {END}),
    ],
)
def test_the_files_of_a_model_name_its_stop_tokens_together(folder, tmp_path, config, generation, wanted):
    says(folder, "config.json", **config)
    if generation:
        says(folder, "generation_config.json", **generation)
    model, tokenizer = load_model(folder)
    assert set(tokenizer.eos_token_ids) == stop_tokens(tokenizer) == ChatCodec.of(tokenizer).stop == wanted
    assert create_policy(model, tokenizer).engine.stop.tolist() == sorted(wanted)
    for layout in ("mlx", "hf"):
        export_folder(load_model(folder)[0], folder, tmp_path / layout, layout=layout)
        assert set(load_model(tmp_path / layout)[1].eos_token_ids) == wanted
        written = json.loads((tmp_path / layout / "generation_config.json").read_text())
        ids = written["eos_token_id"]
        assert set(ids if isinstance(ids, list) else [ids]) == wanted  # where transformers looks
        assert written.get("temperature") == generation.get("temperature")
    export_gguf(model, tokenizer, folder, tmp_path / "out.gguf")
    assert set(load_model(tmp_path / "out.gguf")[1].eos_token_ids) == wanted


@pytest.mark.parametrize("value", ["<|end|>", 1.5, True, [1, None], {"id": 3}, -1])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_eos_token_that_is_no_id_is_refused_by_file(folder, file, value):
    says(folder, file, eos_token_id=value)
    with pytest.raises(UserError, match=r"config.json has .* for eos_token_id|cannot load") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


TEMPLATES = {
    "{% for m in messages %}{{ m['content'] }}<|start|>\n{% endfor %}": {END, START},
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n<|start|>{% endfor %}": {END, START},
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}": {END},
    "{% for m in messages %}{{ m['content'] }}<tool>{% endfor %}": {END},  # a token, and no special one
    "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}<|start|>": {END},
    "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}": {END},
    "{{ raise_exception('no conversation') }}": {END},
    "{{ messages[5]['content'] + 1 }}": {END},
    "{{ 1 // 0 }}": {END},
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_the_chat_template_writes_after_a_turn_ends_it(tmp_path, template):
    convert(write(tmp_path / "m.gguf", tokenizer__chat_template=template), tmp_path / "base")
    _, tokenizer = load_model(tmp_path / "base")
    plain = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert set(tokenizer.eos_token_ids) == stop_tokens(plain) == TEMPLATES[template]


def test_a_tokenizer_of_transformers_is_taken_and_one_that_names_no_end_refused(folder):
    model, ours = load_model(folder)
    plain = AutoTokenizer.from_pretrained(folder)
    assert create_policy(model, plain, {"max_tokens": 3}).engine.stop.tolist() == [END]
    assert len(generate_tokens(model, plain, [5, 6], max_tokens=3)[0]) <= 3
    plain.eos_token = None
    for foreign in (plain, object(), None, "tokenizer"):
        with pytest.raises(UserError, match="names no token that ends a completion; set its eos_token"):
            create_policy(model, foreign)
    assert ours.eos_token_id == END
