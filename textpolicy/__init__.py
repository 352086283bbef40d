"""Reinforcement learning for text generation on MLX."""
