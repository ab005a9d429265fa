"""A server for packed models: transformers' own, behind a guard that checks, bounds and cancels."""
