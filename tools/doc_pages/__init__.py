"""The parts of docs/ that are made from the program, its planner and its measured results. `tools/write_docs.py`."""
