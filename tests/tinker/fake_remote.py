"""A stand-in for a Tinker server: a policy of one number, which says the right answer more often as it grows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np

from textpolicy.types import Completion

STOP = 0


class Letters:
    """A tokenizer of one letter per token, with a chat template that joins the messages."""

    eos_token_id = STOP

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids if i != STOP)

    def apply_chat_template(self, messages, add_generation_prompt=True, tokenize=True):
        text = "".join(m["content"] for m in messages) + "\n"
        return self.encode(text) if tokenize else text


@dataclass
class Server:
    """The states on the server, which outlive a client."""

    states: dict[str, float] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    updates: int = 0


class FakeRemote:
    r"""Answers "2 + 3" with \boxed{5} as often as sigmoid(skill), else with \boxed{6}; an update raises the skill.

    ``sent`` counts the tokens of every call.
    """

    packages = ("numpy",)
    platform = {"device": "none"}  # noqa: RUF012

    def __init__(self, server=None, resume=None, fail_at=None, error=None):
        """``fail_at`` is the update, counted from 0, that raises ``error``, or that the server is gone."""
        self.server, self.tokenizer, self.stop = server or Server(), Letters(), np.array([STOP])
        self.skill = -1.0 if resume is None else self.server.states[resume]
        self.fail_at, self.error = fail_at, error or RuntimeError("the server is gone")
        self.gap = 0.0  # nats, by which the learner's log-probs miss the sampler's
        self.sent = {"prefill": 0, "sampled": 0, "trained": 0}

    def sample(self, prompts, n, sampling):
        out = []
        for i, prompt in enumerate(prompts):
            draw = np.random.default_rng([sampling.seed, i])
            text = self.tokenizer.decode(prompt)
            a, b = (int(word) for word in text.split("?")[0].split(" + "))
            out.append([self._answer(a + b, draw, sampling) for _ in range(n)])
        self.sent["prefill"] += sum(map(len, prompts))
        self.sent["sampled"] += sum(len(c.tokens) for group in out for c in group)
        return out

    def _answer(self, truth, draw, sampling):
        chance = 1 / (1 + np.exp(-self.skill))
        right = chance >= 0.5 if sampling.temperature == 0 else draw.random() < chance
        text = f"let me check. \\boxed{{{truth if right else truth + 1}}}"
        ids = [*self.tokenizer.encode(text), STOP][: sampling.max_tokens]
        temperature = 1.0 if sampling.temperature else 0.0
        logprobs = -draw.uniform(0.1, 2, len(ids)).astype(np.float32)
        return Completion(np.array(ids, np.int32), logprobs, None, ids[-1] != STOP, temperature)

    def score(self, batch, *, reference=False):
        self.sent["prefill"] += int(batch.lengths.sum())
        return np.where(batch.weights != 0, batch.logprobs - self.gap, 0).astype(np.float32)

    def update(self, batch, surrogate, learning_rate):
        rows = ((batch.weights != 0) & (batch.advantages != 0)).any(axis=1)
        self.sent["trained"] += int(batch.lengths[rows].sum())
        if self.server.updates == self.fail_at:
            raise self.error
        self.server.updates += 1
        gain = float(np.clip(batch.advantages * batch.weights, 0, None).sum())
        self.skill += learning_rate * gain
        return {"loss": -gain, "grad_norm": gain, "updated": float(gain > 0)}

    def save(self, path):
        path.mkdir(parents=True, exist_ok=True)
        (path / "tinker.json").write_text(json.dumps({"state": self.weights()}))

    def weights(self):
        return self.save_state("kept")

    def restore(self, weights):
        self.skill = self.server.states[weights]

    def write_weights(self, weights, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "server.json").write_text(json.dumps(weights))

    def read_weights(self, folder):
        return json.loads((folder / "server.json").read_text())

    def write_state(self, folder):
        self.write_weights(self.save_state("step"), folder)

    def read_state(self, folder):
        self.restore(self.read_weights(folder))

    def save_state(self, name):
        path = f"tinker://run-{len(self.server.states)}/weights/{name}"
        self.server.states[path] = self.skill
        return path

    def close(self, status="success"):
        self.server.closed.append(status)
