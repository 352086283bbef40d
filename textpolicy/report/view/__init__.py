"""``textpolicy view``: the completions of a run, or of two, on a local page rendered by a local server."""
