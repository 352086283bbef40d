"""Take a port of this machine, or say in words why it cannot be had."""

from __future__ import annotations

import socket

from ..errors import UserError


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the ``port``, a free one if 0. Raises UserError."""
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise UserError(f"port {port} cannot be used ({error.strerror}); choose another") from error
    return taken
