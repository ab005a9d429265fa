"""Between the backward pass and the optimizer: what is done to gradients."""
