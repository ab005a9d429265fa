"""What a model in whatever form is worth: zero-shot tasks, and GGUF files as llama.cpp computes them."""
