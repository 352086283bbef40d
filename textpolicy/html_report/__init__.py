"""``textpolicy report``: one run or many as a single HTML file that needs nothing else."""
