"""Chat data: read from files, checked, and prepared for a run."""
