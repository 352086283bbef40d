"""A model of pairs of tokens in NumPy, which stands in for one on MLX where only the server is under test."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np

from textpolicy.errors import NotFiniteError, UserError
from textpolicy.serving import Adam, Adapter, Alternatives, Passed, Read, Sampled
from textpolicy.types import Completion

V = 40  # tokens; 0 ends a completion
LETTERS = "\0" + "abcdefghijklmnopqrstuvwxyz .,!?0123456789"[: V - 1]


class Letters:
    """A tokenizer of one letter per token."""

    eos_token_id = 0
    eos_token_ids = (0,)
    chat_template = "yes"

    def encode(self, text, add_special_tokens=False):
        return [LETTERS.index(c) for c in text.lower() if c in LETTERS]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(LETTERS[i] for i in ids if i)

    def apply_chat_template(self, messages, add_generation_prompt=True, tokenize=True, **_):
        text = "".join(f"{m['role'][0]} {m['content']}." for m in messages)
        return self.encode(text) if tokenize else text


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class Pairs:
    """Weights: the logits of a token after another, (V, V)."""

    def __init__(self, delta, base):
        self.delta, self.base = np.array(delta), base

    @property
    def logprobs(self):
        return log_softmax(self.base + self.delta)

    def save(self, folder: Path):
        write(folder, delta=self.delta)


def write(folder, **arrays):
    new = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir(parents=True)
    np.savez(new / "pairs.npz", **arrays)
    (new / "adapter_config.json").write_text(json.dumps({"pairs": True}))
    new.rename(folder)


class PairLearner:
    """Pairs with their gradient and AdamW."""

    def __init__(self, model, adapter):
        self.model, self.adapter = model, adapter
        rng = np.random.default_rng(adapter.seed)
        self.delta = 1e-3 * rng.standard_normal((V, V))
        self.m, self.v, self.t, self.gradient = 0 * self.delta, 0 * self.delta, 0, 0 * self.delta

    def passed(self, data, loss, config, *, backward):
        self.model.gate.wait()
        if loss not in ("cross_entropy", "importance_sampling"):
            raise UserError(f"there is no loss {loss!r}")
        rows, gradient, total = [], 0 * self.delta, 0.0
        logprobs = self.weights().logprobs
        for i, datum in enumerate(data):
            targets = datum.inputs["target_tokens"]
            if any(len(v) != len(datum.tokens) for v in datum.inputs.values()):
                raise UserError(f"the arrays of datum {i} have different lengths")
            row = logprobs[datum.tokens, targets]
            if loss == "cross_entropy":
                weight = datum.inputs.get("weights", np.ones(len(targets)))
                total -= float((weight * row).sum())
            else:
                weight = np.exp(row - datum.inputs["logprobs"]) * datum.inputs["advantages"]
                total -= float(weight.sum())
            for token, target, w in zip(datum.tokens, targets, weight, strict=True):
                gradient[token] += w * np.exp(logprobs[token])
                gradient[token, target] -= w
            rows.append(row.astype(np.float32))
        if backward:
            self.gradient = self.gradient + gradient
        self.model.passes += 1
        return Passed(rows, {"loss:sum": total})

    def step(self, adam: Adam):
        g, self.t = self.gradient, self.t + 1
        if not np.isfinite(g).all() or not np.isfinite(adam.learning_rate):
            raise NotFiniteError("the gradient is not finite; look at the data")
        self.m = adam.beta1 * self.m + (1 - adam.beta1) * g
        self.v = adam.beta2 * self.v + (1 - adam.beta2) * g * g
        m, v = self.m / (1 - adam.beta1**self.t), self.v / (1 - adam.beta2**self.t)
        self.delta = self.delta - adam.learning_rate * (m / (np.sqrt(v) + adam.eps) + adam.weight_decay * self.delta)
        self.gradient = 0 * g
        self.model.steps += 1
        return {"grad_norm:mean": float(np.sqrt((g * g).sum()))}

    def weights(self):
        return Pairs(self.delta, self.model.table)

    def save(self, folder):
        write(folder, delta=self.delta, m=self.m, v=self.v, t=self.t)

    def load(self, folder, *, optimizer):
        with np.load(folder / "pairs.npz") as found:
            if "m" not in found:
                raise UserError(f"{folder.name} has weights for sampling alone")
            self.delta, self.gradient = found["delta"], 0 * self.delta
            if optimizer:
                self.m, self.v, self.t = found["m"], found["v"], int(found["t"])
            else:
                self.m, self.v, self.t = 0 * self.delta, 0 * self.delta, 0

    def close(self):
        self.model.closed += 1


class PairDecoding:
    """A token of every running completion at each step."""

    def __init__(self, model):
        self.model, self.running = model, {}

    def admit(self, key, request):
        if len(request.prompt) + 1 > self.model.context:
            raise UserError("the prompt is too long for a completion")
        table = request.weights.logprobs
        rngs = [np.random.default_rng([request.sampling.seed, i]) for i in range(request.n)]
        self.running[key] = request, table, [([], [], rng) for rng in rngs], [None] * request.n

    def cancel(self, key):
        self.running.pop(key, None)

    def step(self):
        self.model.gate.wait()
        over = {}
        for key, (request, table, states, ends) in list(self.running.items()):
            for i, (tokens, logprobs, rng) in enumerate(states):
                if ends[i] is not None:
                    continue
                before = tokens[-1] if tokens else int(request.prompt[-1])
                row = table[before]
                if np.isnan(row).any():
                    self.cancel(key)
                    over[key] = NotFiniteError("the logits are not finite; check the weights")
                    break
                t = request.sampling.temperature
                scaled = log_softmax(row / t) if t else row
                token = int(np.argmax(row)) if not t else int(rng.choice(V, p=np.exp(scaled) / np.exp(scaled).sum()))
                tokens.append(token)
                logprobs.append(float(scaled[token]))
                text = Letters().decode(tokens)
                if token in request.stop or any(s in text for s in request.strings):
                    ends[i] = False
                elif len(tokens) >= request.sampling.max_tokens:
                    ends[i] = True
            if key in self.running and all(end is not None for end in ends):
                del self.running[key]
                over[key] = [
                    Sampled(
                        Completion(np.array(t, np.int32), np.array(p, np.float32), None, bool(e)),
                        top(table, [int(request.prompt[-1]), *t[:-1]], request.top) if request.top else None,
                    )
                    for (t, p, _), e in zip(states, ends, strict=True)
                ]
        return over

    def __len__(self):
        return len(self.running)


def top(table, before, k):
    order = np.argsort(-table[before], axis=1)[:, :k]
    return Alternatives(order.astype(np.int32), np.take_along_axis(table[before], order, 1).astype(np.float32))


class MadeModel:
    """The base: a table of logits; ``gate`` holds its work up while it is not set."""

    def __init__(self, name="made/pairs", seed=0):
        self.name, self.tokenizer, self.tokenizer_folder = name, Letters(), None
        self.vocabulary, self.context, self.stop = V, 64, frozenset({0})
        self.table = np.random.default_rng(seed).standard_normal((V, V))
        self.base = Pairs(np.zeros((V, V)), self.table)
        self.gate = threading.Event()
        self.gate.set()
        self.passes = self.steps = self.closed = 0
        self.made = PairDecoding(self)

    def learner(self, adapter: Adapter):
        if adapter.rank > 64:
            raise UserError(f"rank is {adapter.rank}; set it to at most 64")
        return PairLearner(self, adapter)

    def loaded(self, folder, *, optimizer):
        learner = PairLearner(self, Adapter(seed=0))
        learner.load(folder, optimizer=optimizer)
        return learner

    def sampler(self, folder):
        with np.load(folder / "pairs.npz") as found:
            return Pairs(found["delta"], self.table)

    def read(self, weights, prompt, *, top=0, targets=None, last=None, draws=0, sampling=None):
        table = weights.logprobs
        after = table[prompt[:-1]]
        row = np.concatenate([[np.nan], after[np.arange(len(prompt) - 1), prompt[1:]]]).astype(np.float32)
        if last is not None:
            row[~last] = np.nan
        found = None
        if top:
            order = np.argsort(-after, axis=1)[:, :top]
            tokens = np.concatenate([np.zeros((1, top), np.int32), order]).astype(np.int32)
            best = np.take_along_axis(after, order, 1)
            found = Alternatives(tokens, np.concatenate([np.full((1, top), -99999.0), best]).astype(np.float32))
        scored = (
            None
            if targets is None
            else np.where(targets >= 0, np.take_along_axis(after, np.maximum(targets, 0), 1), np.nan).astype(np.float32)
        )
        drawn = None
        if draws:
            rng = np.random.default_rng([sampling.seed, 2**32])
            scaled = np.exp(log_softmax(after / sampling.temperature))
            tokens = np.array([rng.choice(V, draws, p=line / line.sum()) for line in scaled], np.int32)
            drawn = Alternatives(tokens, np.take_along_axis(after, tokens, 1).astype(np.float32))
        return Read(row, found, scored, drawn)

    def decoding(self):
        return self.made
