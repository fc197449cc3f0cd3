"""GGUF files for llama.cpp: the model, the adapter alone, and the tokenizer in them."""
