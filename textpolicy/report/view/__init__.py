"""The local page of ``textpolicy view``, which shows the completions of a run, or of two."""
