"""GGUF files for llama.cpp: the model, the adapter alone, the tokenizer."""
