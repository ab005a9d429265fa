// What a block of decode.cu brings into shared memory: weights, tokens (quantized here or before) and scales.
#pragma once
#include "codes.h"
#include "reduce.h"

namespace qat::cuda {
namespace {

constexpr int kRows = 16;   // output rows of a warp's tile
constexpr int kBytes = 64;  // of each row in a stage: 256 codes
constexpr int kStages = 4;
constexpr int kStageBytes = kRows * kBytes;
constexpr int kWarps = kBlock / kWarp;
constexpr int kMostTokens = 16;

struct Decode {
  const void* x;         // [1, K] if fused
  const int8_t* codes;   // [M, KP] interleaved, else
  const float* divisor;  // [M]
  const uint8_t* packed;
  Output out;
  int64_t m, n, k, row_bytes;
  int blocks64;              // KP / 64
  int groups, group_blocks;  // group_blocks: blocks of 64 in a group
  int tokens;                // of a thread block
  int splits;                // warps that share a row tile
  float eps;
  bool wide;  // x can be read 16 bytes at a time
};

// Parts of shared memory, in bytes from its start, for blocks of `tiles` row tiles.
struct Places {
  std::size_t x, sums, scales, divisors, slots, end;
};

__host__ __device__ Places places(int blocks64, int tokens, int groups, int tiles) {
  const auto g = static_cast<std::size_t>(groups), t = static_cast<std::size_t>(tokens);
  Places at = {};
  at.x = static_cast<std::size_t>(kWarps) * kStages * kStageBytes;
  at.sums = at.x + static_cast<std::size_t>(blocks64) * t * 64;                             // int32 [tiles][G][tokens][16]
  at.scales = at.sums + static_cast<std::size_t>(tiles) * g * t * kRows * sizeof(int32_t);  // [16][G] where G > 1
  at.divisors = at.scales + (groups > 1 ? kRows * g * sizeof(float) : 0);
  at.slots = at.divisors + kMostTokens * sizeof(float);
  at.end = at.slots + kWarps * sizeof(float);
  return at;
}

// Stage `block` of a warp's row tile, 256 codes of 16 rows. Chunk c of row r lies at c ^ (r / 2 % 4): no bank conflicts.
__device__ __forceinline__ void fetch(const Decode& p, int64_t row0, int64_t block, unsigned char* stage, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int chunk = half * kWarp + lane, r = chunk / 4, c = chunk % 4;
    const int64_t row = row0 + r, byte = block * kBytes + c * 16;
    const bool valid = row < p.n && byte < p.row_bytes;
    copy_async(stage + r * kBytes + ((c ^ (r >> 1 & 3)) * 16), p.packed + (valid ? row * p.row_bytes + byte : 0), valid);
  }
}

// Block's tokens into shared memory: block64 b of token i at (b * tokens + i) * 64.
__device__ void take_codes(const Decode& p, int64_t token0, int tokens, unsigned char* x_shared, float* divisors) {
  const int total = p.blocks64 * tokens * 4;
  for (int i = static_cast<int>(threadIdx.x); i < total; i += kBlock) {
    const int part = i % 4, block = i / 4 % p.blocks64, token = i / 4 / p.blocks64;
    const uint4 codes = load_fresh(p.codes + ((token0 + token) * p.blocks64 + block) * 64 + part * 16);
    *reinterpret_cast<uint4*>(x_shared + (block * tokens + token) * 64 + part * 16) = codes;
  }
  if (static_cast<int>(threadIdx.x) < tokens) divisors[threadIdx.x] = load_fresh_float(p.divisor + token0 + threadIdx.x);
}

// The same for one token that is not quantized yet. It stays in registers, but for what is longer than 3 loads a thread.
template <class T, bool WIDE>
__device__ void quantize_token(const Decode& p, unsigned char* x_shared, float* divisors, float* slots) {
  constexpr int kKept = 3, kStep = kBlock * Chunk<T>::kSize;
  const T* x = static_cast<const T*>(p.x);
  const int first = static_cast<int>(threadIdx.x) * Chunk<T>::kSize, padded = p.blocks64 * 64;
  Chunk<T> kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) kept[i] = load_chunk<WIDE, true>(x, first + i * kStep, p.k);
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kKept; ++i) most = absmax_with(most, kept[i]);
  for (int begin = first + kKept * kStep; begin < p.k; begin += kStep)
    most = absmax_with(most, load_chunk<WIDE, true>(x, begin, p.k));
  const float divisor = divisor_of(reduce_threads<kBlock>(most, MaxNan(), slots), p.eps);
  auto* codes = reinterpret_cast<int8_t*>(x_shared);
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    if (first + i * kStep < padded) store_interleaved(codes, first + i * kStep, kept[i], divisor);
  for (int begin = first + kKept * kStep; begin < padded; begin += kStep)
    store_interleaved(codes, begin, load_chunk<WIDE, true>(x, begin, p.k), divisor);
  if (threadIdx.x == 0) divisors[0] = divisor;
}

template <class T>
__device__ __forceinline__ void quantize_any_token(const Decode& p, unsigned char* x_shared, float* divisors, float* slots) {
  if (p.wide) {
    quantize_token<T, true>(p, x_shared, divisors, slots);
  } else {
    quantize_token<T, false>(p, x_shared, divisors, slots);
  }
}

// The scales of a block's only row tile, [16][G].
__device__ void take_scales(const Decode& p, int64_t row0, float* scales) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * p.groups; i += kBlock) {
    const int64_t row = row0 + i / p.groups;
    scales[i] = p.out.scale[(row < p.n ? row : p.n - 1) * p.out.scale_stride + i % p.groups];
  }
}

}  // namespace
}  // namespace qat::cuda
