"""Checkpoints, tokenizers and adapters: found, checked, loaded and opened."""
