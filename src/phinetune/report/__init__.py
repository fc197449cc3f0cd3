"""The page of a run: read from its folder, written beside it, served live while it trains."""
