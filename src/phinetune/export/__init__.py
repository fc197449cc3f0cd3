"""What a run hands on: its card (and, later, other clients' forms)."""
