"""Training: settings, run folder, trainer, and what is shown and logged meanwhile."""
