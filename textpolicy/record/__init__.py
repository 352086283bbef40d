"""The run folder: what a run leaves on disk, written while it runs and read back as tables."""
