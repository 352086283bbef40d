"""A run that takes seconds: a random model of two small layers, a tokenizer of bytes, and a task of typing letters.

Every part of a run that a checkpoint holds is in use: a curriculum, SEPA, an entropy bonus that adapts, noise on norms,
several updates a step, a reward that draws.
Nothing here imports mlx, so that a process may do so before it forks.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textpolicy.tasks import TASKS
from textpolicy.tasks.base import Problem, Task

HIDDEN, INNER, LAYERS, HEADS, KEYS, CONTEXT = 32, 64, 2, 4, 2, 256

SETTINGS = """
model = "{model}"
task = "toy"
steps = {steps}
seed = 3
[algorithm]
name = "sepa"
entropy_target = 5.3
entropy_step = 0.02
[algorithm.sepa]
steps = 4
delay_steps = 1
correct_rate_gate = 0.05
[adapter]
rank = 2
[rollout]
prompts_per_step = 4
group_size = 4
max_tokens = 6
curriculum = "pass_rate"
norm_noise = 0.01
[optimizer]
learning_rate = 0.02
warmup_steps = 2
updates_per_step = 2
[evaluation]
every = 2
[checkpoint]
every = {every}
"""


STAGES = """
[[stage]]
kind = "sft"
steps = 2
[[stage]]
kind = "rft"
steps = 1
optimizer.warmup_steps = 1
[[stage]]
kind = "distill"
steps = 2
beta = 0.5
optimizer.updates_per_step = 1
[[stage]]
kind = "rl"
steps = 2
"""


def settings(folder: Path, steps: int = 5, every: int = 1, stages: bool = False) -> Path:
    """A config of the run, and its model, in ``folder``; with ``stages`` of seven steps in four."""
    path = folder / "toy.toml"
    text = SETTINGS.format(model=make_model(folder / "model"), steps=7 if stages else steps, every=every)
    path.write_text(text + STAGES * stages)
    return path


def make_model(folder: Path, seed: int = 0) -> Path:
    """A folder that mlx-lm loads: config, weights, tokenizer with a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(make_weights(len(tokenizer), seed), folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one that ends a completion."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def make_weights(vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    keys = HIDDEN * KEYS // HEADS
    shapes = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        inside = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (keys, HIDDEN),
            "self_attn.v_proj": (keys, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in inside.items()}
    return {
        name: np.ones(shape, np.float32) if len(shape) == 1 else (0.15 * draw(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def letters(prompt: str, completion: str, example: dict, **kwargs: object) -> tuple[float, bool]:
    """The share of letters, and a little luck from the stream that all of Python shares."""
    count = sum(c in string.ascii_letters for c in completion)
    return count / 6 + 0.01 * random.random(), count >= 2


def toy_task() -> Task:
    """Type letters."""
    problems = tuple(Problem(f"Type {n}", str(n)) for n in range(36))
    return Task(
        name="toy",
        summary="type letters",
        train=problems[:24],
        validation=problems[24:30],
        test=problems[30:],
        prompt=lambda question: [{"role": "user", "content": question}],
        reward=letters,
    )


def register() -> None:
    """Make the task known to ``textpolicy train``."""
    TASKS["toy"] = toy_task


def quickly(patch: Any) -> None:
    """Keep a run from measuring memory and drawing charts, which are most of its time; ``patch`` is pytest's."""
    from textpolicy.mlx.memory import Plan

    def as_asked(engine: Any, *arguments: Any, **keywords: Any) -> Plan:
        return Plan(engine.micro_batch_tokens, engine.decode_rows, 0.0, 0.0, 1.0, ())

    patch.setitem(TASKS, "toy", toy_task)
    patch.setattr("textpolicy.mlx.memory.preflight", as_asked)
    for chart in ("line_chart", "stacked_bars"):
        patch.setattr(f"textpolicy.report.page.{chart}", lambda *given, **settings: "")


TIMES = ("sample_seconds", "update_seconds", "tokens_per_second", "peak_memory_bytes", "scaling", "wall_seconds")


def metrics(folder: Path) -> list[dict]:
    """The rows of a run, without what depends on the clock or on what else the process did."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("rank_")} for row in rows]


def outcome(folder: Path) -> dict:
    """All that must be equal between a run in one go and one that was cut short: bytes, or rows."""
    summary = json.loads((folder / "summary.json").read_text())
    summary = {k: v for k, v in summary.items() if k not in ("train_seconds", "peak_memory_bytes")}
    files = {f"adapter/{p.name}": p.read_bytes() for p in sorted((folder / "adapter").iterdir())}
    for place in ("rollouts", "evals"):
        files |= {f"{place}/{p.name}": p.read_bytes() for p in sorted(folder.glob(f"{place}/[!.]*"))}
    return {"metrics": metrics(folder), "summary": summary, **files}
