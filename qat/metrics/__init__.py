"""Perplexity, and how far two models are apart: pure functions on logits and layers."""
