"""A run on the hub: what is published, and its cards."""
