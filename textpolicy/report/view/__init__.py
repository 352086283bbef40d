"""``textpolicy view``: the completions of a run, or of two, on a local page that is made on the server."""
