"""The configuration of a run. Each section has a file, and each knob is declared once."""
