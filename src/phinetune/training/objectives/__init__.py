"""What a run trains for: what an objective is, one file for each, and the registry that names them."""
