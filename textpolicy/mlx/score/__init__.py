"""The scoring of batches and its gradients: padded micro-batches, log-probs of packed rows, checkpointed blocks."""
