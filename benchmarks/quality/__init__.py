"""Scripts that measure how good predictions and gradients are."""
