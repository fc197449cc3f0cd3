"""A run written for others: merged, converted, for other programs, on the hub."""
