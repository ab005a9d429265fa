"""Pretrained models and tokenizers from wherever the user has them, and where they come from."""
