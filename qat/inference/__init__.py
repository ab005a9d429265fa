"""A packed model made fast at one token: fused layers, smaller heads, a key-value cache that is allocated once."""
