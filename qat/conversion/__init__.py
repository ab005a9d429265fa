"""From a model to one with BitLinear layers and back: which layers and why not, the swap, and the record of it."""
