"""A real file of Gemma 3 270M in Q4_K_M says what transformers' Gemma 3 says with the same numbers.

The file is no dependency: scripts/gemma_file.py makes it in the user's cache, and TEXTPOLICY_GEMMA may name another
place. Without it, or without torch (see scripts/torch_env.py), the tests are skipped and say so.
"""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from platformdirs import user_cache_dir
from torch_peer import needs_torch

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import gguf
import mlx.core as mx
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protobuf

from textpolicy.engine import Sampling
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.files.safetensors import save_arrays
from textpolicy.mlx.models import load_model
from textpolicy.types import Batch, Completion, Episode

FILE = Path(
    os.environ.get("TEXTPOLICY_GEMMA") or Path(user_cache_dir("textpolicy")) / "peers" / "gemma-3-270m-q4_k_m.gguf"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not FILE.exists(), reason="no file of Gemma 3 270M here: python scripts/gemma_file.py makes it"),
]
ROOT = Path(__file__).parents[3]
CONFIG = {  # that of google/gemma-3-270m
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time",
    "Water boils at",
    "The largest planet is",
    "1, 2, 3, 4,",
    "To be, or not to be,",
    "La capitale de l'Italie est",
    "Der Mond ist",
    "import numpy as np\n\nx = np.",
    "The opposite of hot is",
    "In 1969,",
    "She opened the door and",
    "A triangle has",
    "Photosynthesis is",
    "Dear Sir or Madam,",
    "SELECT name FROM",
    "# Introduction\n\n",
    "The quick brown fox",
    "Der schnelle braune Fuchs",
]
LONG = (
    "Chapter 1\n\n" + "The rain went on and on, and nobody came to the house by the river. " * 50
)  # beyond the window


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTPOLICY_CACHE", str(cache))
        yield load_model(FILE)
    shutil.rmtree(cache)  # 330 MB


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """transformers' folder with the numbers that the gguf package reads."""
    folder, arrays = tmp_path_factory.mktemp("peer"), {}
    for tensor in gguf.GGUFReader(FILE).tensors:
        *block, name, _ = tensor.name.split(".")
        place = f"model.layers.{block[1]}.{NAMES[name]}" if block else NAMES[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        arrays[f"{place}.weight"] = mx.array(values - 1 if "norm" in name else values)
    save_arrays(folder / "model.safetensors", arrays, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    yield folder
    shutil.rmtree(folder)  # 1.1 GB


@needs_torch
def test_log_probs_and_greedy_texts_are_those_of_transformers(loaded, peer, torch):
    model, tokenizer = loaded
    engine = MLXEngine(model, stop=tokenizer.eos_token_ids)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    rows = [*prompts, tokenizer.encode(LONG), tokenizer.encode((ROOT / "README.md").read_text()[:1500])]
    assert max(map(len, rows)) > 700
    theirs = torch(folder=str(peer), tokens=rows, prompts=prompts, new_tokens=16)
    assert theirs["missing_keys"] == theirs["unexpected_keys"] == []
    episodes = []
    for row in rows:
        completion = Completion(np.array(row[1:], np.int32), np.full(len(row) - 1, -1, np.float32))
        episodes.append(Episode.from_completion(row[:1], completion, reward=0.0, group=0))
    ours = engine.score(Batch.pack(episodes, [np.zeros(len(row), np.float32) for row in rows]))
    gap = max(np.abs(a[: len(b)] - b).max() for a, b in zip(ours, map(np.array, theirs["logprobs"]), strict=True))
    print(f"largest difference of a log-prob: {gap:.1e} nats over {sum(map(len, rows)) - len(rows)} tokens")
    assert gap < 1e-3
    greedy = [c.tokens.tolist() for [c] in engine.sample(prompts, 1, Sampling(16, temperature=0.0))]
    assert greedy == theirs["continued"]


def test_ids_are_those_of_the_sentencepiece_library_over_a_corpus(loaded):
    fields = gguf.GGUFReader(FILE).fields
    names, scores, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    proto = protobuf.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.trainer_spec.pad_id, proto.trainer_spec.eos_id, proto.trainer_spec.bos_id, proto.trainer_spec.unk_id = range(
        4
    )
    for key in ("add_dummy_prefix", "remove_extra_whitespaces"):
        setattr(proto.normalizer_spec, key, False)
    for i, (name, score, kind) in enumerate(zip(names, scores, types, strict=True)):
        plain = name.replace(" ", "\u2581") if kind == 4 else name
        proto.pieces.add(piece=plain, score=score, type=2 if i == proto.trainer_spec.unk_id else kind)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = [file.read_text() for folder in ("docs", "textpolicy") for file in sorted((ROOT / folder).rglob("*.*[dy]"))]
    hard = (
        "Hello  world\r\n\t 2024! naïve cafe\u0301 Ⅷ ½ привет 你好 मरहबा १२३ 🙂🙂 <td><td> \u2581 <0x41> \x00\x07     x"
    )
    rng = random.Random(0)
    texts += ["".join(rng.choice(hard) for _ in range(rng.randint(1, 80))) for _ in range(500)]
    tokenizer, count = loaded[1], 0
    control = [name for name, kind in zip(names, types, strict=True) if kind == 3]  # which a text may hold as such
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    for text in [*lines, *texts]:
        if any(map(text.__contains__, control if ">" in text else ())):
            continue
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == oracle.encode(text), text
        assert tokenizer.decode(ids) == oracle.decode(ids), text
        count += len(ids)
    print(f"{count} tokens")
    assert count > 500_000
