"""From an operation and its output gradient to per-sample gradients: a registry."""
