"""The formats a model is read from: safetensors, GGUF, tokenizer files."""
