"""Checks every row before a run: reports what is unusual or wrong, and repairs what can be repaired."""
