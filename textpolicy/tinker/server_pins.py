"""What the local Tinker server is made of, complete: nothing else is installed, and nothing newer."""

PINS: tuple[str, ...] = ()
