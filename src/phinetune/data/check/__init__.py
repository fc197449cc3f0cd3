"""A look at every row before a run: what stands out, and what can be mended."""
