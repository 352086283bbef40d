"""The local Tinker server, in an environment of its own, for tests and development."""
