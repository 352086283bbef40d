"""The few sizes to which rows, lengths and slots are rounded up."""

from __future__ import annotations

import mlx.core as mx

_ROOM, _MANY = 64, 256  # slots of compiled steps come in multiples of the first; of the second, if many


def size_up(n: int) -> int:
    """Return the smallest of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n, at most 1.5 n.

    Compiled functions are reused where sizes are these.
    """
    power = 1 << max(n - 1, 0).bit_length()  # n or more
    return 0 if n == 0 else power * 3 // 4 if power > 3 and n <= power * 3 // 4 else power


def step_slots(n: int) -> int:
    """Return the number of slots, at least n, for which decoding steps are compiled."""
    room = _ROOM if n <= 2 * _MANY else _MANY
    return -(-n // room) * room


def slot_block() -> int:
    """Return the number of slots that a growing context allocates at a time on the default device.

    CUDA's fast attention wants blocks of 256, which on a Mac would only be memory spent.
    """
    if mx.default_device() == mx.cpu:
        return 1
    return 64 if mx.metal.is_available() else 256
