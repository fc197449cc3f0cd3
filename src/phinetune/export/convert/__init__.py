"""Adapters from one form to another: PEFT's, split or fused, and loralib's."""
