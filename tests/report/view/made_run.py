"""A small run folder made by the real recorder, with hostile completions in it."""

from __future__ import annotations

import json

import numpy as np
from conftest import recipe

from textpolicy.record.recorder import Recorder
from textpolicy.types import Completion, Episode

SCRIPT = "<script>document.title='run'</script>"
IMAGE = "<img src=x onerror=\"document.title='run'\">"
VOCABULARY = ["", " let", " me", " check", SCRIPT, IMAGE, " {{ 7*7 }}", "\n", " seven", " 42"]
STEPS, PROMPTS, SAMPLES = 6, 3, 4


def spell(tokens):
    return [VOCABULARY[t] for t in tokens]


def make_run(folder, seed=0, steps=STEPS, over=True):
    """Make a run of ``steps`` steps of hicra, whose rewards rise; token 0 stops and has no text."""
    folder.mkdir()
    config = {"algorithm": {"name": "hicra"}, "task": "largest", "model": "tiny", "seed": seed}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("")
    rng, recorder = np.random.default_rng(seed), Recorder(folder, spell)
    for split in ("test", "validation"):
        evaluate(folder, recorder, rng, 0, split)
    for step in range(steps):
        add_step(folder, recorder, rng, step)
    evaluate(folder, recorder, rng, steps, "validation")
    if over:
        (folder / "summary.json").write_text(json.dumps({"test_after": 0.75, "kept_step": steps}))
    return folder


def add_step(folder, recorder, rng, step):
    episodes = [episode(rng, group, step) for group in range(PROMPTS) for _ in range(SAMPLES)]
    algorithm = recipe("hicra")
    credited = algorithm.credited(episodes, algorithm.tokens(episodes))
    recorder.step(step, {}, credited)
    rewards = [e.reward for e in episodes]
    row = {
        "kind": "train", "step": step, "reward_mean": float(np.mean(rewards)), "reward_mean/form": 0.5,
        "entropy": 1 / (step + 1),
        "length_mean": 4.0, "truncated": 0.1, "sampled_tokens": 48.0, "sample_seconds": 1.0, "update_seconds": 2.0,
        "tokens_per_second": 16.0, "clip_fraction_high": 0.01, "grad_norm": 0.3, "frac_reward_zero_std": 0.2,
        "peak_memory_bytes": 1e9,
    }  # fmt: skip
    write(folder, row)


def evaluate(folder, recorder, rng, step, split):
    episodes = [episode(rng, group, step, temperature=0.0) for group in range(PROMPTS)]
    recorder.evaluated(step, split, {"kind": "eval"}, episodes)
    write(folder, {"kind": "eval", "step": step, "split": split, "accuracy": 0.5, "problems": PROMPTS})


def write(folder, row):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def episode(rng, group, step, temperature=1.0):
    tokens = np.array([*rng.integers(1, len(VOCABULARY), 5), 0], np.int32)
    logprobs, entropy = -rng.random(6).astype(np.float32), rng.random(6).astype(np.float32)
    completion = Completion(tokens, logprobs, entropy, truncated=bool(rng.random() < 0.2), temperature=temperature)
    shown = {"prompt": f"Question {group} <b>?</b>", "prompt_index": group, "scores": {"form": 0.5}}
    pieces = tuple(spell(tokens))
    reward = float(rng.random() < (step + 1) / (STEPS + 1))
    scored = {"reward": reward, "group": group, "is_correct": reward == 1, "text": "".join(pieces), "pieces": pieces}
    return Episode.from_completion([1, 2, 3], completion, **scored, **shown)
