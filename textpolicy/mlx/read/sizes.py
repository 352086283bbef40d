"""The few sizes to which rows and lengths are padded, so that compiled functions are reused."""

from __future__ import annotations


def size_up(n: int) -> int:
    """Return the smallest of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n: at most 1.5 n."""
    power = 1 << max(n - 1, 0).bit_length()  # n or more
    return 0 if n == 0 else power * 3 // 4 if power > 3 and n <= power * 3 // 4 else power
