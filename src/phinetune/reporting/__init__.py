"""The HTML page of a run, made from the files in its folder: written there, or served live while the run trains."""
