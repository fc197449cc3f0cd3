"""Merging an adapter into its base: one model that needs no adapter."""
