"""A Tinker server on this machine, in an environment of its own, to test and develop against."""
