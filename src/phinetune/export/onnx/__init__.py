"""ONNX folders for onnxruntime-genai."""
