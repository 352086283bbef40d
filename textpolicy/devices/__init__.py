"""One run on several devices: the ranks, what they exchange, how work is dealt, and how they start and end together."""
