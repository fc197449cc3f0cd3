"""Neutral chats that are shipped with the package: what a tuned model should not forget, and prompts for replay."""
