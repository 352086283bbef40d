"""Adapters: attaching, saving, loading, merging and fingerprinting LoRA, DoRA, QLoRA and TinyLoRA."""
