"""Modules and nothing else: BitLinear, PackedBitLinear, the norm that they may have."""
