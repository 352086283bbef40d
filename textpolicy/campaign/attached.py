"""Run a module as a program that ends when its standard input closes.

    python -m textpolicy.campaign.attached MODULE [ARGUMENTS]

The campaign has the other end: if it is killed, even by a signal that it cannot catch, no run is left writing.
"""

from __future__ import annotations

import os
import runpy
import sys
from threading import Thread


def main() -> None:
    """Run the module in ``sys.argv`` while a thread waits for the end of the standard input."""
    Thread(target=_end_with_input, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with_input() -> None:
    """End this process, at once, when its standard input closes."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
