"""From rows to encoded sets, in memory, on disk or as a stream."""
