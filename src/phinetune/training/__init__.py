"""Training: a run is prepared, trained by its objective, saved and resumed."""
