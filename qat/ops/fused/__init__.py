"""The training linear by one compiled op each way, where the many of `qat.ops` would cost as much as the arithmetic."""
