"""The adapters LoRA, DoRA, QLoRA, LoRA-XS and TinyLoRA: attach, save, load, merge and fingerprint them."""
