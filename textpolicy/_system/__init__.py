"""The operating system: durable files, locks, signals, random state, optional packages, the machine."""
