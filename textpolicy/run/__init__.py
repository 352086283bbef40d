"""The course of one run, from settings to folder: assembly, training, checkpoints, resume, summary, export."""
