"""Scoring and gradients: padded micro-batches, log-probs of packed rows, checkpointed layers."""
