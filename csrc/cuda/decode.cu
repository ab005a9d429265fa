// Packed linear for few tokens: y [M, N] from x [M, K] and 2-bit weights as they lie on disk, M up to 16 a pass.
//
// Floor: the weights' N K / 4 bytes at 4.3 TB/s: 2.06 us for 13824 x 2560, 1.03 for 2560 x 6912, .57 and .38 for 3840 and
// 2560 x 2560. The last two are within a launch's latency, so what counts there is how little is done in sequence.
// Design: the tensor cores do the arithmetic whatever M is: a warp takes 16 output rows, weights are the A operand and up to
// 8 tokens the columns of B, so an mma's work is hidden and only its operand costs: 9 instructions for 16 codes. For
// 13824 x 2560 that is 1.3 us of the ALU pipe on 132 SMs, below the floor and independent of M. A dp4a for each token would
// cost as much for the first one and again for every other.
// Weights come by asynchronous copies, 16 bytes each, into a ring of 4 x 1 KB that a warp has for itself, so the main loop
// has no block barrier. In flight: 3 KB a warp x 26 warps (N = 13824: 3456 warps on 132 SMs, one wave at 4 blocks an SM)
// = 78 KB an SM, twice latency x bandwidth. Warps split K in up to 8, so that 160 row tiles (N = 2560) still give 1280 warps.
// They meet in int32 sums in shared memory, one for each group, by atomic adds, which in integers have no order; the float
// sum over groups, which has one, is taken at the end.
// The copies start before anything else: a single token is quantized by every block for itself while they are under way
// (5 KB from the L2 cache); with `overlap` they even start before the previous kernel on the stream has ended.
// Activations lie in shared memory interleaved (codes.h), so that a B fragment is one 16-byte load without bank conflicts.
// Not measured: no GPU was there when this was written.
#include "decode_input.h"
#include "internal.h"

namespace qat::cuda {
namespace {

constexpr int64_t kFusedWidth = 16384;  // a longer token is quantized by a launch of its own
constexpr int64_t kWantedWarps = 2048;  // 15 an SM on a large GPU

// One block of 64 codes of 16 rows times NT * 8 tokens.
template <int NT>
__device__ __forceinline__ void multiply(const unsigned char* stage, int j, const unsigned char* x_block, int tokens, int lane,
                                         int32_t (&acc)[NT][4]) {
  const int g = lane / 4, q = lane % 4, at = ((j ^ (g >> 1 & 3)) * 16) + q * 4;
  uint32_t upper[4], lower[4];
  expand(*reinterpret_cast<const uint32_t*>(stage + g * kBytes + at), upper);
  expand(*reinterpret_cast<const uint32_t*>(stage + (g + 8) * kBytes + at), lower);
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    const int token = nt * 8 + g;
    uint4 x = {0, 0, 0, 0};
    if (token < tokens) x = *reinterpret_cast<const uint4*>(x_block + token * 64 + q * 16);
    mma_s8(acc[nt], {upper[0], lower[0], upper[1], lower[1]}, {x.x, x.y});
    mma_s8(acc[nt], {upper[2], lower[2], upper[3], lower[3]}, {x.z, x.w});
  }
}

// A warp's share of a group's sums [tokens][16], and from zero again.
template <int NT>
__device__ __forceinline__ void flush(int32_t* sums, int tokens, int lane, int32_t (&acc)[NT][4]) {
#pragma unroll
  for (int nt = 0; nt < NT; ++nt)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = nt * 8 + lane % 4 * 2 + i % 2;
      if (token < tokens) atomic_add(sums + token * kRows + lane / 4 + i / 2 * 8, acc[nt][i]);
      acc[nt][i] = 0;
    }
}

// One output from the sums of its groups, `step` apart.
__device__ __forceinline__ void finish(const Decode& p, const int32_t* sums, int step, float divisor, const float* scales,
                                       int64_t row, int64_t token) {
  float y = 0.0f;
  if (p.groups > 1) {
    for (int g = 0; g < p.groups; ++g) y = accumulate(y, sums[g * step], scales[g]);
    y = divide(y, divisor);
  } else {
    y = rescale(sums[0], divisor, reciprocal(p.out.scale[row * p.out.scale_stride]));
  }
  if (p.out.bias) y = add(y, p.out.bias[row]);
  store_element(p.out.y, p.out.dtype, token * p.n + row, y);
}

template <int NT, bool FUSED>
__global__ void __launch_bounds__(kBlock, NT > 1 ? 3 : 4) decode_kernel(const Decode p) {
  unsigned char* ring = shared_memory();
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * p.tokens;
  const int tokens = static_cast<int>(p.m - token0 < p.tokens ? p.m - token0 : p.tokens);
  const int tiles = kWarps / p.splits, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, split = warp % p.splits;
  const Places at = places(p.blocks64, p.tokens, p.groups, tiles);
  unsigned char* x_shared = ring + at.x;
  int32_t* sums = reinterpret_cast<int32_t*>(ring + at.sums);
  float *scales = reinterpret_cast<float*>(ring + at.scales), *divisors = reinterpret_cast<float*>(ring + at.divisors);

  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * tiles * kRows, row0 = block_row + warp / p.splits * kRows;
  unsigned char* own = ring + static_cast<std::size_t>(warp) * kStages * kStageBytes;
  const int blocks256 = (p.blocks64 + 3) / 4, count = row0 < p.n ? (blocks256 - split + p.splits - 1) / p.splits : 0;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count) fetch(p, row0, split + int64_t{s} * p.splits, own + s * kStageBytes, lane);
    commit_copies();
  }
  const int group_sums = tokens * kRows, tile_sums = p.groups * group_sums;
  for (int i = static_cast<int>(threadIdx.x); i < tiles * tile_sums; i += kBlock) sums[i] = 0;
  if (p.groups > 1) take_scales(p, block_row, scales);
  wait_for_previous();
  let_next_start();
  if constexpr (FUSED) {
    float* slots = reinterpret_cast<float*>(ring + at.slots);
    switch (p.out.dtype) {
      case Dtype::f32: quantize_any_token<float>(p, x_shared, divisors, slots); break;
      case Dtype::bf16: quantize_any_token<Bf16>(p, x_shared, divisors, slots); break;
      case Dtype::f16: quantize_any_token<F16>(p, x_shared, divisors, slots); break;
    }
  } else {
    take_codes(p, token0, tokens, x_shared, divisors);
  }
  __syncthreads();

  int32_t* own_sums = sums + warp / p.splits * tile_sums;
  int32_t acc[NT][4] = {};
  for (int it = 0; it < count; ++it) {
    wait_copies<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled next
    if (it + kStages - 1 < count)
      fetch(p, row0, split + int64_t{it + kStages - 1} * p.splits, own + (it + kStages - 1) % kStages * kStageBytes, lane);
    commit_copies();
    const unsigned char* stage = own + it % kStages * kStageBytes;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int block = (split + it * p.splits) * 4 + j;
      if (block >= p.blocks64) break;
      multiply<NT>(stage, j, x_shared + static_cast<std::size_t>(block) * static_cast<std::size_t>(tokens) * 64, tokens, lane,
                   acc);
      const bool ends = (block + 1) % p.group_blocks == 0 || j == 3;  // what this warp has of the group
      if (p.groups > 1 && ends) flush(own_sums + block / p.group_blocks * group_sums, tokens, lane, acc);
    }
  }
  if (p.groups == 1 && count > 0) flush(own_sums, tokens, lane, acc);
  __syncthreads();

  for (int i = static_cast<int>(threadIdx.x); i < tiles * group_sums; i += kBlock) {
    const int r = i % kRows, token = i / kRows % tokens, tile = i / group_sums;
    const int64_t row = block_row + tile * kRows + r;
    if (row < p.n)
      finish(p, sums + tile * tile_sums + token * kRows + r, group_sums, divisors[token], scales + r * p.groups, row,
             token0 + token);
  }
}

int blocks_of_64(const PackedLinear& p) { return static_cast<int>(padded_width(p.k, p.groups) / 64); }

// Warps that share a row tile: all with groups, whose sums have room for one tile only, else until there are enough.
int splits_of(const PackedLinear& p) {
  int splits = p.groups > 1 ? kWarps : 1;
  while (splits < kWarps && splits * 4 < blocks_of_64(p) && ceil_div<int64_t>(p.n, kRows) * splits < kWantedWarps) splits *= 2;
  return splits;
}

// Most tokens of a block such that their codes fit beside the ring; 0 if not even one does.
int tokens_that_fit(const PackedLinear& p) {
  const int tiles = kWarps / splits_of(p);
  int tokens = static_cast<int>(p.m < kMostTokens ? p.m : kMostTokens);
  while (tokens > 0 && places(blocks_of_64(p), tokens, static_cast<int>(p.groups), tiles).end > kMostShared) --tokens;
  return tokens;
}

template <int NT, bool FUSED>
int run(const Decode& d, cudaStream_t stream, bool overlap) {
  const dim3 grid = {static_cast<unsigned>(ceil_div<int64_t>(d.n, kRows * (kWarps / d.splits))),
                     static_cast<unsigned>(ceil_div<int64_t>(d.m, d.tokens))};
  return launch(decode_kernel<NT, FUSED>, grid, kBlock, places(d.blocks64, d.tokens, d.groups, kWarps / d.splits).end, stream,
                d, overlap);
}

}  // namespace

// Whole 16-byte loads of every row, and groups of whole blocks of 64 codes.
bool decode_serves(const PackedLinear& p) {
  const bool rows = aligned(p.packed, 16) && ceil_div<int64_t>(p.k, 4) % 16 == 0;
  return p.m <= kMostTokens && rows && (p.groups == 1 || p.k / p.groups % 64 == 0) && tokens_that_fit(p) > 0;
}

bool packed_linear_fused(const PackedLinear& p) { return p.m == 1 && p.k <= kFusedWidth && decode_serves(p); }

int decode(const PackedLinear& p, cudaStream_t stream) {
  Decode d = {};
  d.x = p.x;
  d.codes = p.codes;
  d.divisor = p.divisor;
  d.packed = p.packed;
  d.out = p.out;
  d.m = p.m;
  d.n = p.n;
  d.k = p.k;
  d.row_bytes = ceil_div<int64_t>(p.k, 4);
  d.blocks64 = blocks_of_64(p);
  d.groups = static_cast<int>(p.groups);
  d.group_blocks = d.blocks64 / d.groups;
  d.eps = p.eps;
  d.wide = wide_rows(p.x, p.k, size_of(p.out.dtype));
  const int most = tokens_that_fit(p), slices = static_cast<int>(ceil_div<int64_t>(p.m, most));
  d.tokens = static_cast<int>(ceil_div<int64_t>(p.m, slices));
  d.splits = splits_of(p);
  if (packed_linear_fused(p)) return run<1, true>(d, stream, p.overlap && d.wide);
  // The kernel right before is the one that quantized x, and writes no weights.
  return d.tokens <= 8 ? run<1, false>(d, stream, true) : run<2, false>(d, stream, true);
}

}  // namespace qat::cuda
