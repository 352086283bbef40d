"""Train on several devices: the ranks of a run, what they exchange, how work is dealt, how they start and end."""
