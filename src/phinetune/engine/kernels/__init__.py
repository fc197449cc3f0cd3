"""Functions on tensors, each with its own backward. They know nothing about models."""
