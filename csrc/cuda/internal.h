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

// Many tokens (gemm.cu). The plan is chosen by gemm_plan from the shape and the device's multiprocessors; tests force each.
enum class Tile { small, medium, large };
struct Plan {
  Tile tile;
  int splits;     // of K, at most: 1 where `partial` is null, and with groups, whose sums are floats
  double cycles;  // that are expected, to compare plans
};
Plan gemm_plan(int sms, int64_t m, int64_t n, int64_t k, int64_t groups, bool may_split);
int gemm(const Linear& p, const Plan& plan, cudaStream_t stream);
int packed_gemm(const PackedLinear& p, const Plan& plan, cudaStream_t stream);
// What so many splits need for their sums (split.cu).
int64_t partial_bytes(int64_t m, int64_t n, int splits);

// The same on Hopper (gemm_hopper.cu).
bool hopper_wanted();
Plan hopper_plan(int sms, int64_t m, int64_t n, int64_t k, bool may_split);
bool hopper_serves(const Linear& p);
bool hopper_serves(const PackedLinear& p);
int hopper_gemm(const Linear& p, int splits, cudaStream_t stream);
int hopper_packed_gemm(const PackedLinear& p, int splits, cudaStream_t stream);

}  // namespace qat::cuda
