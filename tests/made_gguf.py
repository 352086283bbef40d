"""Small GGUF files of random weights, and a plain Llama in NumPy that reads them."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
LETTERS = sorted(ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
WORDS = ["he", "ll", "hell", "hello", "Ġhello"]
TOKENS = ["<|end|>", "<|start|>", "<tool>", *LETTERS, *WORDS]
TYPES = [3, 3, 4] + [1] * (len(LETTERS) + len(WORDS))
VOCAB = len(TOKENS)

METADATA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.chat_template": "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}",
}
SHAPES = {
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def tensors(tied=True):
    """Random weights under their GGUF names."""
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (VOCAB, HIDDEN)} | ({} if tied else {"output": (VOCAB, HIDDEN)})
    norms = ["output_norm"]
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in SHAPES.items()}
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    weights = {f"{name}.weight": draw.normal(0, 0.2, shape) for name, shape in shapes.items()}
    weights |= {f"{name}.weight": draw.uniform(0.5, 1.5, HIDDEN) for name in norms}
    return {name: array.astype(np.float32) for name, array in weights.items()}


def write(
    path,
    kind=Kind.F32,
    embedding=None,
    architecture="llama",
    tied=True,
    edit=None,
    endianess=gguf.GGUFEndian.LITTLE,
    **metadata,
):
    """A small GGUF file; ``metadata`` overrides an entry (``__`` for a dot), None leaves it out."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    for key, value in (METADATA | {name.replace("__", "."): value for name, value in metadata.items()}).items():
        add_value(writer, key, value)
    weights = tensors(tied)
    if edit:
        edit(weights)
    for name, array in weights.items():
        wanted = Kind.F32 if array.ndim == 1 else embedding if embedding and "embd" in name else kind
        if array.dtype == int:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_like(path, architecture, weights, kinds=None, metadata=None):
    """A GGUF file of any architecture with the tokenizer above; ``kinds`` has raw blocks and their type by name."""
    own = {key: value for key, value in METADATA.items() if key.startswith("tokenizer.")}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (own | (metadata or {})).items():
        add_value(writer, key, value)
    for name, array in weights.items():
        raw, kind = (kinds or {}).get(name, (np.asarray(array, np.float32), Kind.F32))
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


HALVES = {  # where a block of the type keeps its scales, in bytes
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
}


def random_blocks(kind, shape, seed=0):
    """Raw bytes of (rows, columns) values of about 0.1 in a type that the gguf package reads and does not write."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (shape[0] * shape[1] // block, size), np.uint8)
    for at in HALVES[kind]:
        raw[:, at : at + 2] = rng.uniform(1e-3, 2e-3, (len(raw), 1)).astype(np.float16).view(np.uint8)
    values = gguf.quants.dequantize(raw, kind)
    for at in HALVES[kind]:  # brought to the same size in every type
        half = raw[:, at : at + 2].copy().view(np.float16) * np.float16(0.1 / values.std())
        raw[:, at : at + 2] = half.view(np.uint8)
    return raw.reshape(shape[0], -1)


def add_value(writer, key, value):
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def stored(path):
    """The file's tensors as float32, by the gguf package alone."""
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}


def plain_llama(weights, tokens):
    """Logits (T, vocab) of a slow numpy Llama on GGUF's own rows, whose rotation pairs neighbours."""
    turn = rotation(len(tokens))
    x = weights["token_embd.weight"][tokens]
    for i in range(LAYERS):
        w = {name.split(".")[2]: array for name, array in weights.items() if name.startswith(f"blk.{i}.")}
        x = x + attention(normed(x, w["attn_norm"]), w, turn)
        y = normed(x, w["ffn_norm"])
        gate = y @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["ffn_up"].T)) @ w["ffn_down"].T
    return normed(x, weights["output_norm.weight"]) @ weights.get("output.weight", weights["token_embd.weight"]).T


def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def rotation(length):
    frequency = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return np.exp(1j * np.arange(length)[:, None] * frequency)  # (T, head_dim / 2)


def attention(x, w, turn):
    def heads(name, n):
        return (x @ w[name].T).reshape(len(x), n, HEAD_DIM)

    def turned(rows):
        pairs = (rows[..., 0::2] + 1j * rows[..., 1::2]) * turn[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(rows.shape)

    q, k, v = turned(heads("attn_q", HEADS)), turned(heads("attn_k", KV_HEADS)), heads("attn_v", KV_HEADS)
    out = np.zeros_like(q)
    for h in range(HEADS):
        g = h // (HEADS // KV_HEADS)
        for t in range(len(x)):
            scores = np.exp(k[: t + 1, g] @ q[t, h] / np.sqrt(HEAD_DIM))
            out[t, h] = scores @ v[: t + 1, g] / scores.sum()
    return out.reshape(len(x), -1) @ w["attn_output"].T
