"""Functions on tensors, each with its own backward. They know torch alone."""
