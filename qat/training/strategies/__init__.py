"""One training on several devices: how its processes begin, and what each strategy does with model and gradients."""
