"""Giving a run to others: merged, converted, written for another program, or pushed to the hub."""
