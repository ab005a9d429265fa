"""A real llama.cpp, asked in a process of its own."""
