"""Group baselines: GRPO (arXiv:2402.03300) and Dr. GRPO (arXiv:2503.20783)."""

import numpy as np


def center(rewards: np.ndarray) -> np.ndarray:
    """A_i = r_i - mean(r). Keeps a problem's difficulty in the scale (arXiv:2503.20783, sec. 3).

    Exactly 0 for a group that agrees, where the rounding of the mean could leave a residue
    that an adaptive optimiser would blow up to a full step.
    """
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)
    return rewards - rewards.mean()


def standardize(rewards: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """A_i = (r_i - mean(r)) / (std(r) + eps), with the sample (Bessel) std (arXiv:2402.03300, sec. 4.1.2).

    A group of one, and a group that agrees, get 0.
    """
    if len(rewards) == 1:
        return np.zeros_like(rewards)
    return center(rewards) / (rewards.std(ddof=1) + eps)
