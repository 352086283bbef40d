"""What was exported, in the real transformers and peft: same tokens, same log-probs.

These two need torch, which is no dependency of textpolicy, so they run in a Python that has them: the one named by
TEXTPOLICY_TORCH, this one, or the environment that scripts/torch_env.py makes in the user's cache. Without any
of the three the tests are skipped and say so; test_export.py holds the same files against NumPy and mlx-lm.
"""

import json
import shutil

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
from made_gguf import TOKENS, write
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes
from test_export import KINDS, MERGED_ONLY, adapted, run_folder, train
from torch_peer import needs_torch

from textpolicy.cli.main import main
from textpolicy.mlx.adapters.attach import detach
from textpolicy.mlx.adapters.merging import save_adapter
from textpolicy.mlx.export import export_folder
from textpolicy.mlx.export.files import HF_LAYOUT
from textpolicy.mlx.files.gguf import convert
from textpolicy.mlx.models import find_model, load_model

TOLERANCE = 1e-3  # nats, float32
SENTENCES = [[5, 100, 7, 7, 200, 33], [260, 3, 90, 91, 92, 17, 44, 120, 8, 8]]


pytestmark = needs_torch


def logprobs(model, tokens):
    """Of every token after the first, in float32 by mlx."""
    out = []
    for row in tokens:
        logits = model(mx.array([row]))[0, :-1].astype(mx.float32)
        exact = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        out.append(np.array(exact)[np.arange(len(row) - 1), row[1:]])
    return out


def assert_same(theirs, ours):
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_transformers_scores_the_merged_folder_as_mlx_the_adapted_model(torch, tmp_path, cache, kind):
    run = run_folder(tmp_path, kind)
    assert main(["export", str(run), "--to=hf", "--dtype=float32", f"--out={tmp_path / 'out'}"]) == 0
    theirs = torch(folder=str(tmp_path / "out"), tokens=SENTENCES)
    assert theirs["missing_keys"] == theirs["unexpected_keys"] == []
    model, _ = adapted(run)
    assert_same(theirs["logprobs"], logprobs(model, SENTENCES))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MERGED_ONLY])
@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_peft_puts_the_adapter_on_the_exported_base_and_scores_alike(torch, tmp_path, cache, kind):
    run = run_folder(tmp_path, kind)
    base, _ = adapted(run)
    detach(base)  # not --model=small.gguf, because a qlora's own base is quantised further
    export_folder(base, find_model(tmp_path / "small.gguf"), tmp_path / "base", dtype="float32")
    assert main(["export", str(run), "--to=peft", f"--base={tmp_path / 'base'}", f"--out={tmp_path / 'out'}"]) == 0
    theirs = torch(adapter=str(tmp_path / "out"), tokens=SENTENCES)
    assert theirs["arrays"] == sorted(mx.load(str(tmp_path / "out" / "adapter_model.safetensors")))
    model, _ = adapted(run)
    assert_same(theirs["logprobs"], logprobs(model, SENTENCES))
    bare = load_model(tmp_path / "small.gguf")[0]
    assert max(np.abs(a - b).max() for a, b in zip(theirs["logprobs"], logprobs(bare, SENTENCES), strict=True)) > 0.05


# Every type of model in the list


COMMON = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
EXTRA = {
    "cohere": {"layer_norm_eps": 1e-5, "tie_word_embeddings": True, "logit_scale": 0.1},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"sliding_window": 4096},
    "gemma3_text": GEMMA | {"sliding_window": 4, "sliding_window_pattern": 2, "rope_local_base_freq": 1e4},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "phi3": {"original_max_position_embeddings": 512},
    "qwen3": {"head_dim": 8},
    "starcoder2": {"norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True},
}


def base_folder(tmp_path, kind):
    """A random model of that type as a folder of Hugging Face, all of its numbers other than those it starts with."""
    config = COMMON | {"model_type": kind} | EXTRA.get(kind, {})
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(0)
    for name, array in tree_flatten(model.parameters()):
        drawn = mx.random.uniform(0.5, 1.5, array.shape) if array.ndim == 1 else 0.2 * mx.random.normal(array.shape)
        model.update(tree_unflatten([(name, drawn)]))
    convert(write(tmp_path / "small.gguf"), tmp_path / kind)
    (tmp_path / kind / "config.json").write_text(json.dumps(config))
    (tmp_path / kind / "model.safetensors").unlink()
    mx.save_safetensors(str(tmp_path / kind / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return tmp_path / kind


@pytest.mark.parametrize("kind", HF_LAYOUT)
def test_each_type_of_model_is_the_same_in_transformers_merged_and_under_peft(torch, tmp_path, kind):
    base = base_folder(tmp_path, kind)
    model, _ = load_model(base)
    train(model, "lora")
    save_adapter(model, tmp_path / "adapter")
    ours = logprobs(model, SENTENCES)
    source = ["export", "--model", str(base), "--adapter", str(tmp_path / "adapter")]
    assert main([*source, "--to=hf", f"--out={tmp_path / 'hf'}"]) == 0
    assert main([*source, "--to=peft", f"--out={tmp_path / 'peft'}"]) == 0
    theirs = torch(folder=str(tmp_path / "hf"), tokens=SENTENCES)
    assert theirs["missing_keys"] == theirs["unexpected_keys"] == []
    assert_same(theirs["logprobs"], ours)
    assert_same(torch(adapter=str(tmp_path / "peft"), tokens=SENTENCES)["logprobs"], ours)


# The built-in


@pytest.mark.slow
def test_the_built_in_scores_talks_and_stops_in_transformers_as_it_does_here(torch, tmp_path):
    model, tokenizer = load_model("smollm2-135m")
    train(model, "lora", size=0.005)
    save_adapter(model, tmp_path / "adapter")
    hf, peft, base = tmp_path / "hf", tmp_path / "peft", tmp_path / "base"
    bare = ["export", "--model=smollm2-135m"]
    trained = [*bare, f"--adapter={tmp_path / 'adapter'}"]
    assert main([*trained, "--to=hf", "--dtype=float32", f"--out={hf}"]) == 0
    assert main([*bare, "--to=hf", "--dtype=float32", f"--out={base}"]) == 0
    assert main([*trained, "--to=peft", f"--base={base}", f"--out={peft}"]) == 0
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    tokens = [prompt, tokenizer.encode("Numbers from one to twelve, in order: one, two, three, four, five, six")]
    ours = logprobs(model, tokens)
    theirs = torch(folder=str(hf), tokens=tokens, chat=chat, new_tokens=12)
    assert theirs["chat"] == prompt
    assert theirs["stops"] == tokenizer.eos_token_id
    assert_same(theirs["logprobs"], ours)
    assert theirs["greedy"] == greedy(model, prompt, 12, tokenizer.eos_token_ids)
    assert_same(torch(adapter=str(peft), tokens=tokens)["logprobs"], ours)
    shutil.rmtree(tmp_path)  # 1.5 GB


def greedy(model, prompt, count, stops):
    """The likeliest continuation, by reading everything again for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] not in stops):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]
