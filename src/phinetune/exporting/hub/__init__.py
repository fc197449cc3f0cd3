"""Pushing a run to the hub: which files, and the model cards."""
