"""Folders that ollama create takes."""
