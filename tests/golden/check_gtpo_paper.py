"""GTPO and GRPO-S as in the paper: shaped rewards, both normalisations, losses and gradients, exact entropy."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from objective import answers, rows, weights_of
from vectors import Answer, Case, UnknownCase

from textpolicy.algorithms.credit import row_mean
from textpolicy.algorithms.gtpo import live_counts, normalize, sequence_rewards, shaped_rewards
from textpolicy.losses import Clip, Surrogate, importance_ratio
from textpolicy.mlx.decode.sampling import draw
from textpolicy.mlx.score.logprobs import Split, token_logprobs


def check(case: Case) -> list[Answer]:
    if "logits" in case.inputs:
        return from_logits(case)
    if "mask" not in case.inputs:
        raise UnknownCase(case.id)
    group = Group(case)
    if "seq_entropy" in case.expected:
        return group.sequence_answers()
    if "loss" in case.expected:
        return group.loss_answers()
    known = group.token_answers()
    return [Answer(key, known[key]) for key in case.expected if key in known]


class Group:
    """The completions of one prompt, flat as the package takes them, and back as (B, T) grids."""

    def __init__(self, case: Case):
        self.case, self.p = case, case.params
        self.mask = case.array("mask") != 0
        self.row, self.position = np.nonzero(self.mask)
        self.entropy = case.array("entropies")[self.mask]
        self.reward = case.array("rewards")
        self.group = np.zeros(len(self.reward), int)
        self.threshold = self.p.get("reward_threshold", 0.5)
        self.success = (self.reward > self.threshold)[self.row]

    def shaped(self) -> np.ndarray:
        names = {"alpha_1": "alpha1", "alpha_2": "alpha2", "eps": "eps"}
        given = {ours: self.p[theirs] for ours, theirs in names.items() if theirs in self.p}
        places = (self.entropy, self.row, self.position, self.reward, self.group)
        return shaped_rewards(*places, reward_threshold=self.threshold, **given)

    def advantages(self, normalisation: str) -> np.ndarray:
        return normalize(self.shaped(), self.success, self.group[self.row], normalisation, self.p.get("eps", 1e-8))

    def token_answers(self) -> dict:
        shaped, separate = self.shaped(), self.advantages("separate")
        counts = live_counts(self.row, self.position, self.reward, self.group, self.threshold)
        return {
            "shaped": self.grid(shaped),
            "advantages": self.grid(separate),
            "advantages_separate": self.grid(separate),
            "advantages_joint": self.grid(self.advantages("joint")),
            "mean_pos": mean(shaped[self.success]),
            "mean_neg": mean(shaped[~self.success]),
            "d_t": self.by_position(counts, self.success),
            "h_t": self.by_position(counts, ~self.success),
            "corr_adv_entropy_pos": correlation(separate[self.success], self.entropy[self.success]),
            "corr_adv_entropy_neg": correlation(separate[~self.success], self.entropy[~self.success]),
        }

    def loss_answers(self) -> list[Answer]:
        advantages = self.grid(self.advantages("separate"))
        batch = rows(self.case.array("old_logprobs"), advantages, weights_of(self.mask, self.p["aggregation"]))
        how = Surrogate(Clip(self.p["eps_low"], self.p["eps_high"]))
        return [Answer("advantages", advantages), *answers(self.case.array("logprobs"), batch, how)]

    def sequence_answers(self) -> list[Answer]:
        logprobs, old = self.case.array("logprobs"), self.case.array("old_logprobs")
        betas = {"beta_1": self.p["beta1"], "beta_2": self.p["beta2"], "reward_threshold": self.threshold}
        shaped = sequence_rewards(self.entropy, self.row, self.reward, self.group, **betas)
        advantages = normalize(shaped, self.reward > self.threshold, self.group, "separate")
        ratio = importance_ratio(np.where(self.mask, logprobs - old, 0), self.mask, "sequence-mean", np)
        how = Surrogate(Clip(self.p["eps_low"], self.p["eps_high"]), "sequence-mean")
        return [
            Answer("seq_entropy", row_mean(self.entropy, self.row, len(self.reward))),
            Answer("shaped", shaped),
            Answer("advantages", advantages),
            Answer("seq_ratio", ratio[:, 0]),
            *answers(logprobs, rows(old, advantages, weights_of(self.mask, "seq-mean-token-mean")), how),
        ]

    def grid(self, values: np.ndarray) -> np.ndarray:
        out = np.zeros(self.mask.shape)
        out[self.mask] = values
        return out

    def by_position(self, counts: np.ndarray, which: np.ndarray) -> np.ndarray:
        out = np.zeros(self.mask.shape[1])
        out[self.position[which]] = counts[which]
        return out


def mean(values: np.ndarray) -> float | None:
    return values.mean() if len(values) else None


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """None where it is not defined: of fewer than two values, or of constant ones."""
    return np.corrcoef(one, other)[0, 1] if len(one) > 1 and one.std() > 0 and other.std() > 0 else None


def from_logits(case: Case) -> list[Answer]:
    """What the sampler and the learner say of the same logits, through MLX."""
    logits, sampled = mx.array(case.array("logits"), mx.float32), case.inputs["sampled"]
    no_head = Split(nn.Identity(), ())  # hidden states are logits
    scored = token_logprobs(no_head, logits, mx.array(sampled), mx.ones(len(sampled)), gradient=False)
    logprob = np.array(scored.logprobs)
    out = {
        "sampled_logprob": logprob,
        "surprisal": -logprob,
        "logsumexp": np.array(logits)[np.arange(len(sampled)), sampled] - logprob,
        "entropy": sampler_entropy(logits, 1.0),
    }
    tempered = {k: float(k.removeprefix("entropy_at_T").replace("_", ".")) for k in case.expected if "_at_T" in k}
    out |= {key: sampler_entropy(logits, temperature) for key, temperature in tempered.items()}
    return [Answer(key, value, "float32") for key, value in out.items()]


def sampler_entropy(logits: mx.array, temperature: float) -> np.ndarray:
    rows = mx.arange(len(logits))
    return np.array(draw(logits, rows, mx.full((len(logits),), 0.5), temperature).entropy)
