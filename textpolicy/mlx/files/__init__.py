"""The file formats of models: safetensors, GGUF and tokenizer files."""
