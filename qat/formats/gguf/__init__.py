"""GGUF files: architectures, block types, tokenizer, container, and the comparison with what was packed."""
