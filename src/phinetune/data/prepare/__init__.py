"""Makes sets of encoded examples from rows: in memory, on disk or as a stream."""
