"""Many jobs, and the same one again: which are done, which go on, and what became of each."""
