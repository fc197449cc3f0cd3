"""Folders for onnxruntime-genai."""
