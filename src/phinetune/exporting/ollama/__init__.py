"""Folders for `ollama create`."""
