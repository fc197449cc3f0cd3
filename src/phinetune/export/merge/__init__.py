"""A base and its adapter as one model."""
