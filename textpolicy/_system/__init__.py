"""The operating system: durable files, locks, signals, processes, random state, the machine."""
