"""Finds, checks, loads and opens checkpoints, tokenizers and adapters."""
