"""The ``textpolicy`` command."""

from .main import main as main
