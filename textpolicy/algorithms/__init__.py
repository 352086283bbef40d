"""The table of recipes: one file per idea, combined here. docs/algorithms.md explains every row."""

from __future__ import annotations

from dataclasses import replace

from ..errors import unknown_name
from ..losses import Clip, ClippedWeight, CrossEntropy, ImportanceSampling, SoftGate, Surrogate, WithinDivergence
from .credit import Credit as Credit
from .credit import Rewards as Rewards
from .gdpo import DecoupledRelative
from .grams import DEFAULT_STRATEGIC_GRAMS
from .grpo import GroupRelative
from .gtpo import ShapeByEntropy
from .hicra import AmplifyPlanning
from .maxrl import MeanNormalized
from .opo import LengthWeighted
from .pipeline import Algorithm as Algorithm
from .planning import PlanningGrams
from .reinforce import NoBaseline, ReturnToGo, Whiten
from .rloo import LeaveOneOut
from .sepa import Pooling
from .weighting import WeightByUncertainty

_HIGHER = Surrogate(Clip(0.2, 0.28))  # clip-higher, arXiv:2503.14476
_GSPO_BAND = Clip(3e-4, 4e-4)  # arXiv:2507.18071, sec. 5.1
_GRAMS = PlanningGrams(DEFAULT_STRATEGIC_GRAMS)

_GRPO = Algorithm(
    GroupRelative(),
    aggregation="seq-mean-token-mean",
    summary="a completion against the others of its prompt, in standard deviations",
    paper="arXiv:2402.03300",
)

ALGORITHMS = {
    "grpo": _GRPO,
    "dr_grpo": Algorithm(
        GroupRelative("none"),
        aggregation="seq-mean-token-sum-norm",
        summary="GRPO without its biases towards short answers and easy problems",
        paper="arXiv:2503.20783",
    ),
    "dapo": Algorithm(
        GroupRelative(),
        surrogate=_HIGHER,
        overlong_cache=0.2,
        resample=10,
        summary="clip-higher, token mean, batches refilled with groups that disagree, overlong answers punished",
        paper="arXiv:2503.14476",
    ),
    "bnpo": replace(_GRPO, aggregation="token-mean", summary="GRPO with one mean over all tokens", paper="TRL 1.16"),
    "gdpo": Algorithm(
        DecoupledRelative(),
        (Whiten(),),
        summary="several rewards, each normalised on its own, then summed and whitened",
        paper="arXiv:2601.05242",
    ),
    "echo": Algorithm(
        GroupRelative(),
        echo=0.1,
        summary="grpo that also learns to predict what tools and environments say",
        paper="prime-rl",
    ),
    "opo": Algorithm(
        LengthWeighted(),
        surrogate=Surrogate(ImportanceSampling()),
        summary="a completion against the mean reward per token of its prompt",
        paper="arXiv:2505.23585",
    ),
    "rloo": Algorithm(
        LeaveOneOut(),
        surrogate=Surrogate(ratio="sequence-sum"),
        aggregation="seq-mean-token-mean",
        summary="REINFORCE with the other completions as the baseline; one ratio per completion",
        paper="arXiv:2402.14740",
    ),
    "reinforce++": Algorithm(
        NoBaseline(),
        (ReturnToGo(), Whiten()),
        summary="no group baseline; returns are whitened over the batch",
        paper="arXiv:2501.03262",
    ),
    "reinforce++_baseline": Algorithm(
        GroupRelative("none"),
        (Whiten(),),
        summary="REINFORCE++ after subtracting the group's mean",
        paper="arXiv:2501.03262",
    ),
    "cispo": Algorithm(
        GroupRelative(),
        surrogate=Surrogate(ClippedWeight()),
        summary="clips the weight of a token's gradient and never the gradient",
        paper="arXiv:2506.13585",
    ),
    "gspo": replace(
        _GRPO,
        surrogate=Surrogate(_GSPO_BAND, ratio="sequence"),
        summary="one length-normalised ratio per completion",
        paper="arXiv:2507.18071",
    ),
    "gspo_token": replace(
        _GRPO,
        surrogate=Surrogate(_GSPO_BAND, ratio="sequence-token"),
        summary="GSPO's ratio with an advantage per token",
        paper="arXiv:2507.18071",
    ),
    "luspo": Algorithm(
        GroupRelative(),
        surrogate=Surrogate(Clip(2e-3, 2.5e-3), ratio="sequence"),  # sec. 5.1
        aggregation="seq-mean-token-sum",
        summary="GSPO whose completions weigh by their length",
        paper="arXiv:2602.05261",
    ),
    "dppo": Algorithm(
        GroupRelative(),
        surrogate=Surrogate(WithinDivergence()),
        summary="bounds how far a token's probability moves, and not its ratio",
        paper="arXiv:2602.04879",
    ),
    "dppo_kl": Algorithm(
        GroupRelative(),
        surrogate=Surrogate(WithinDivergence("kl", 0.05, 0.05)),
        summary="DPPO with the KL divergence of a token's probability",
        paper="arXiv:2602.04879",
    ),
    "ipo": Algorithm(
        GroupRelative("none"),
        surrogate=Surrogate(WithinDivergence("tv", 0.1, 0.1, symmetric=True, weight_high=None), drift=2e-3),
        summary="DPPO that drops a token in both directions, and holds ratios near 1",
        paper="prime-rl",
    ),
    "dro": Algorithm(
        GroupRelative(),
        surrogate=Surrogate(CrossEntropy(), drift=0.1),
        summary="the log-likelihood times the advantage, held near the sampler by a square",
        paper="arXiv:2405.19107",
    ),
    "sapo": replace(
        _GRPO,
        surrogate=Surrogate(SoftGate()),
        summary="a smooth gate in place of clipping",
        paper="arXiv:2511.20347",
    ),
    "maxrl": Algorithm(
        MeanNormalized(),
        summary="divides by the success rate: hard problems weigh as in maximum likelihood",
        paper="arXiv:2602.02710",
    ),
    "gtpo": Algorithm(
        GroupRelative("none"),
        (WeightByUncertainty(),),
        surrogate=_HIGHER,
        summary="surprising tokens weigh more",
        paper="textpolicy",
    ),
    "gtpo_paper": Algorithm(
        GroupRelative("none"),
        (ShapeByEntropy(),),
        surrogate=_HIGHER,
        uncertainty="entropy",
        summary="rewards shaped token by token with exact entropies; joint normalisation",
        paper="arXiv:2508.04349",
    ),
    "sepa": Algorithm(
        GroupRelative("none"),
        (WeightByUncertainty(),),
        surrogate=_HIGHER,
        pooling=Pooling(),
        grams=_GRAMS,
        summary="gtpo with the surprisal of execution tokens pooled, so planning tokens stand out",
        paper="textpolicy",
    ),
    "hicra": Algorithm(
        GroupRelative("none"),
        (AmplifyPlanning(),),
        surrogate=_HIGHER,
        grams=_GRAMS,
        summary="planning tokens weigh more in success and less in failure",
        paper="arXiv:2509.03646",
    ),
    "full": Algorithm(
        MeanNormalized(),
        (WeightByUncertainty(), AmplifyPlanning()),
        surrogate=_HIGHER,
        pooling=Pooling(),
        grams=_GRAMS,
        summary="MaxRL, SEPA, surprisal weights and HICRA together",
        paper="textpolicy",
    ),
}


def algorithm(name: str) -> Algorithm:
    """Return the recipe called ``name``. Raises UserError, with the nearest and all known names, for any other."""
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]
