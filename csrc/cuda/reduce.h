// Sums and maxima over the lanes of a warp, a part of one, or a block: in a fixed order, the same result in every thread.
#pragma once
#include "ptx.h"

namespace qat::cuda {

constexpr int kBlock = 256;  // threads of a block wherever this header is used

struct MaxNan {
  __device__ float operator()(float a, float b) const { return max_nan(a, b); }
};
struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

template <int WIDTH, class V, class Op>
__device__ __forceinline__ V reduce_lanes(V value, Op op) {
#pragma unroll
  for (int mask = WIDTH / 2; mask > 0; mask /= 2) value = op(value, shuffle_xor(value, mask));
  return value;
}

// Over THREADS neighbouring threads: at most a warp, or the whole block, which then needs its own shared slots[8].
template <int THREADS, class V, class Op>
__device__ __forceinline__ V reduce_threads(V value, Op op, V* slots) {
  value = reduce_lanes < THREADS<kWarp ? THREADS : kWarp>(value, op);
  if constexpr (THREADS > kWarp) {
    static_assert(THREADS == kBlock);
    if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = slots[0];
    for (int i = 1; i < kBlock / kWarp; ++i) value = op(value, slots[i]);
  }
  return value;
}

}  // namespace qat::cuda
