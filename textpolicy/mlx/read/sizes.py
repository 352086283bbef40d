from __future__ import annotations


def size_up(n: int) -> int:
    """The smallest of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds n: at most half as much again."""
    power = 1 << max(n - 1, 0).bit_length()  # n or more
    return 0 if n == 0 else power * 3 // 4 if power > 3 and n <= power * 3 // 4 else power


def size_down(n: int) -> int:
    """The largest of the same sizes that is at most n."""
    return n if size_up(n) == n else size_down(n - 1)
