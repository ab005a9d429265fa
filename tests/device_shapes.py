"""The shapes that the CUDA ops are tested with on a GPU. test_cuda_paths.py shows, without one, that they reach every kernel."""

from __future__ import annotations

# M, N, K, groups. Decode of real models, as one token, up to 8 and up to 16, in groups of an even and an odd number of blocks
DECODE = [(1, 2560, 6912, 1), (2, 13824, 2560, 1), (16, 3840, 2560, 1), (1, 577, 2560, 5), (1, 576, 960, 5), (7, 577, 2560, 5)]
DECODE += [(7, 576, 960, 5), (16, 577, 2560, 5), (16, 576, 960, 5)]
# Many tokens, for each tile: whole ones, and edges in every direction; rows of 16 bytes and of any length; one group and more
PREFILL = [(40, 577, 1280, 1), (129, 577, 1537, 1), (129, 576, 1537, 1), (512, 2560, 2560, 1), (2048, 4352, 320, 1)]
PREFILL += [(1024, 3328, 2560, 1), (1020, 3325, 2560, 1), (2047, 4345, 320, 1)]
PREFILL += [(128, 13824, 320, 1), (127, 13825, 320, 1)]
TRAINING = [
    (128, 13824, 320, 1),
    (127, 13825, 320, 1),
    (40, 577, 1280, 1),
    (300, 577, 1537, 1),
    (300, 576, 1537, 1),
    (1024, 2560, 2560, 1),
    (33, 6912, 2560, 1),
]
TRAINING += [(1020, 3325, 2576, 1), (2048, 4352, 320, 1), (1024, 3328, 2560, 1), (2047, 4345, 336, 1)]
# K in parts, for each tile: whole rows, edges in every direction, rows of any length, and a token alone
SPLITS = [(64, 576, 1536, 1), (130, 577, 1552, 1), (33, 2045, 2043, 1), (256, 2048, 8192, 1), (500, 2557, 6912, 1)]
PREFILL += SPLITS
TRAINING += [*SPLITS, (1, 512, 2048, 1), (3, 577, 8192, 1)]
GROUPS = [(40, 577, 1280, 5), (40, 576, 1280, 5), (1100, 3321, 640, 5), (1100, 3328, 640, 5), (300, 577, 1535, 5)]
GROUPS += [(129, 576, 1535, 5)]
PREFILL += GROUPS
TRAINING += GROUPS

# Widths of tokens: what a warp or a block holds in float32 and in 16 bits, what none does, and what is not aligned
ACTIVATIONS = [(33, k) for k in (37, 512, 1024, 1536, 2048, 3072, 8192, 16384, 20000)]
# Granularity, N, K, group size: the same of weights
WEIGHTS = [("tensor", 577, 2560, None), ("tensor", 577, 1537, None), ("group", 64, 1280, 256), ("channel", 33, 37, None)]
WEIGHTS += [("channel", 33, k, None) for k in (64, 128, 256, 512, 1024, 1536, 3072, 4096, 8192, 12288, 24576)]
# M, N, K of products whose integers are the result: of one part of K, and of several
INTEGERS = [(300, 320, 512), (576, 192, 8192), (577, 191, 8200)]
