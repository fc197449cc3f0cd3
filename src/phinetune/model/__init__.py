"""Checkpoints of the Phi-3 family: making the starter, loading, adapting, scoring."""
