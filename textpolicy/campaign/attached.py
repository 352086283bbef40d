"""Runs a module as a program that ends with whoever holds the other end of its standard input.

    python -m textpolicy.campaign.attached MODULE [ARGUMENTS]

A campaign that is killed, even by a signal that it cannot catch, thus leaves no run behind that still writes.
"""

from __future__ import annotations

import os
import runpy
import sys
from threading import Thread


def main() -> None:
    Thread(target=_end_with_input, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
