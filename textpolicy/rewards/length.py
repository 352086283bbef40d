"""The rewards for the number of words alone, for examples 09 and 10; in real training multiply them by correctness.

Otherwise the policy learns to write nonsense of the right length.
"""

from __future__ import annotations


def brevity(words: int) -> float:
    """Return 1.2 for 6 to 10 words, falling to 1 at 20 and to 0.2 at 120; 0.8 below 6, 0.2 for none."""
    if words <= 5:
        return 0.8 if words else 0.2
    if words <= 20:
        return min(1.2, 1.2 - 0.02 * (words - 10))
    return max(0.2, 1 - 0.008 * (words - 20))


def plateau(words: int, low: int = 15, high: int = 25, decay: float = 0.95) -> float:
    """Return 1 from ``low`` to ``high`` words, decay ** (words too few or too many) outside; 0 for none."""
    if words == 0:
        return 0.0
    return decay ** max(low - words, words - high, 0)
