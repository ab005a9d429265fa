// What the kernel files call of each other.
#pragma once
#include "codes.h"

namespace qat::cuda {

// Quantizes x of a packed linear into its scratch: codes [M, padded_width(K, G)], groups padded with 0 to whole blocks of 64,
// every 64 in that order (codes.h), and the divisor.
int quantize_interleaved(const PackedLinear& p, Order order, cudaStream_t stream);

// Few tokens (decode.cu). `codes` null: quantized in the kernel, M = 1.
bool decode_serves(const PackedLinear& p);
int decode(const PackedLinear& p, cudaStream_t stream);

// Many tokens (gemm.cu). The tile is chosen by gemm_tile from the shape; tests force each.
enum class Tile { small, medium, large };
Tile gemm_tile(int64_t m, int64_t n, int64_t groups);
int gemm(const Linear& p, Tile tile, cudaStream_t stream);
int packed_gemm(const PackedLinear& p, Tile tile, cudaStream_t stream);

// The same on Hopper (gemm_hopper.cu).
bool hopper_wanted(int64_t m, int64_t n);
bool hopper_serves(const Linear& p);
bool hopper_serves(const PackedLinear& p);
int hopper_gemm(const Linear& p, cudaStream_t stream);
int hopper_packed_gemm(const PackedLinear& p, cudaStream_t stream);

}  // namespace qat::cuda
