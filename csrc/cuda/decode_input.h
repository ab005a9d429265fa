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
constexpr int kZeros = 320;  // 64 bytes for each block of a stage, and 64 in front

struct Decode {
  const void* x;         // [1, K] if fused
  const int8_t* codes;   // [M, KP] interleaved, else
  const float* divisor;  // [M]
  const uint8_t* packed;
  Output out;
  int64_t m, n, k, row_bytes, eight_rows;  // the latter in bytes, too
  int blocks64;              // KP / 64
  int groups, group_blocks;  // group_blocks: blocks of 64 in a group
  uint32_t group_factor;     // ceil(2^31 / group_blocks): a block's group without a division
  int tokens;                // of a thread block
  int splits;                // warps that share a row tile, a power of 2
  float eps;
  bool wide;  // x can be read 16 bytes at a time
};

// Parts of shared memory, in bytes from its start, for blocks of `tiles` row tiles.
struct Places {
  std::size_t x, zeros, sums, offsets, scales, divisors, slots, end;
};

// Blocks of 64 codes in shared memory: whole stages, so that the main loop asks for no end.
__host__ __device__ constexpr int stage_blocks(int blocks64) { return (blocks64 + 3) / 4 * 4; }

__host__ __device__ Places places(int blocks64, int tokens, int groups, int tiles) {
  const auto g = static_cast<std::size_t>(groups), t = static_cast<std::size_t>(tokens);
  Places at = {};
  at.x = static_cast<std::size_t>(kWarps) * kStages * kStageBytes;
  at.zeros = at.x + static_cast<std::size_t>(stage_blocks(blocks64)) * t * 64;               // what lanes without a token read
  at.sums = at.zeros + kZeros;                                                               // int32 [tiles][G][tokens][16]
  at.offsets = at.sums + static_cast<std::size_t>(tiles) * g * t * kRows * sizeof(int32_t);  // int32 [G][tokens]
  at.scales = at.offsets + (g * t + 3) / 4 * 4 * sizeof(int32_t);                            // [16][G] where G > 1
  at.divisors = at.scales + (groups > 1 ? kRows * g * sizeof(float) : 0);
  at.slots = at.divisors + kMostTokens * sizeof(float);
  at.end = at.slots + kWarps * sizeof(float);
  return at;
}

// What a lane brings of a stage, 256 codes of 16 rows: 16-byte chunk lane % 4 of rows lane / 4 and 8 more. Chunk c of row r lies
// at c ^ (r / 2 % 4): no bank conflicts. Stages are fetched in order, `step` of them apart, and addresses only move on.
struct Fetcher {
  const uint8_t* upper;
  int to, left, step;  // left: bytes of the row from this stage's chunk on
  bool has_upper, has_lower;

  __device__ __forceinline__ Fetcher(const Decode& p, int64_t row0, int first, int lane) {
    const int r = lane / 4, c = lane % 4, begin = first * kBytes + c * 16;
    step = p.splits * kBytes;
    left = static_cast<int>(p.row_bytes) - begin;
    to = r * kBytes + ((c ^ (r >> 1 & 3)) * 16);
    has_upper = row0 + r < p.n;
    has_lower = row0 + r + 8 < p.n;
    upper = p.packed + (row0 + r) * p.row_bytes + begin;
  }

  __device__ __forceinline__ void prefetch_stage(const Decode& p, int ahead) const {
    if (left <= ahead * step) return;
    if (has_upper) prefetch(upper + ahead * step);
    if (has_lower) prefetch(upper + p.eight_rows + ahead * step);
  }

  __device__ __forceinline__ void fetch(const Decode& p, unsigned char* stage) {
    copy_async(stage + to, upper, has_upper && left > 0);
    copy_async(stage + to + 8 * kBytes, upper + p.eight_rows, has_lower && left > 0);
    upper += step;
    left -= step;
  }
};

// Block's tokens into shared memory: block64 b of token i at (b * tokens + i) * 64, and zeros up to whole stages.
__device__ void take_codes(const Decode& p, int64_t token0, int tokens, unsigned char* x_shared, float* divisors) {
  const int total = stage_blocks(p.blocks64) * tokens * 4;
  for (int i = static_cast<int>(threadIdx.x); i < total; i += kBlock) {
    const int part = i % 4, token = i / 4 % tokens, block = i / 4 / tokens;
    uint4 codes = {0, 0, 0, 0};
    if (block < p.blocks64) codes = load_fresh(p.codes + ((token0 + token) * p.blocks64 + block) * 64 + part * 16);
    store_shared(x_shared + i * 16, codes);
  }
  if (static_cast<int>(threadIdx.x) < tokens) divisors[threadIdx.x] = load_fresh_float(p.divisor + token0 + threadIdx.x);
}

__device__ __forceinline__ int group_of(const Decode& p, int block) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(block)) * p.group_factor >> 31);
}

// The sums of tokens' codes by groups [G][tokens] into `offsets`, which are zeros: products of codes t + 1 exceed those of t by
// them. Four neighbouring lanes take a block of 64.
__device__ __forceinline__ void sum_codes(const Decode& p, int tokens, const unsigned char* x_shared, int32_t* offsets) {
  const int total = p.blocks64 * tokens * 4;
  for (int first = 0; first < total; first += kBlock) {  // whole warps, as lanes meet
    const int i = first + static_cast<int>(threadIdx.x);
    int32_t sum = 0;
    if (i < total) {
      const uint4 x = load_shared<uint4>(x_shared + i * 16);
      sum = add_bytes(x.x, add_bytes(x.y, add_bytes(x.z, add_bytes(x.w, 0))));
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (i < total && i % 4 == 0) atomic_add(offsets + group_of(p, i / 4 / tokens) * tokens + i / 4 % tokens, sum);
  }
}

// The same for one token that is not quantized yet. It stays in registers, but for what is longer than 2 loads a thread.
template <class T, bool WIDE>
__device__ void quantize_token(const Decode& p, unsigned char* x_shared, float* divisors, float* slots) {
  constexpr int kKept = 2, kStep = kBlock * Chunk<T>::kSize;
  const T* x = static_cast<const T*>(p.x);
  const int first = static_cast<int>(threadIdx.x) * Chunk<T>::kSize, padded = stage_blocks(p.blocks64) * 64;
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
    if (first + i * kStep < padded) store_fields(codes, first + i * kStep, kept[i], divisor);
  for (int begin = first + kKept * kStep; begin < padded; begin += kStep)
    store_fields(codes, begin, load_chunk<WIDE, true>(x, begin, p.k), divisor);
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
