"""The kernels' libraries: compiled once, kept, found again."""
