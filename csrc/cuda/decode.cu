// Packed linear for few tokens: y [M, N] from x [M, K] and 2-bit weights as they lie on disk, M up to 16 a pass.
//
// Floor: the weights' N K / 4 bytes at 4.3 TB/s: 2.06 us for 13824 x 2560, 1.03 for 2560 x 6912, .57 and .38 for 3840 and
// 2560 x 2560. The last two are within a launch's latency, so what counts there is how little is done in sequence.
// Design: the tensor cores do the arithmetic whatever M is: a warp takes 16 output rows, weights are the A operand and up to
// 8 tokens the columns of B, so an mma's work is hidden and only its operand costs. A 2-bit word is four operand words by one
// instruction each: byte b & 3 << 2 f is 4^f (t + 1), an unsigned byte. Every field f has sums of its own, which are multiples of
// 4^f and shifted when they meet, and the sum of x, by which codes t + 1 give more than t, is taken off at the end. Expanding a
// word to bytes t was 9 instructions instead of 4. A dp4a for each token would cost as much for the first one and again for every
// other. Executed instructions: docs/internals/kernels.md.
// Weights come by asynchronous copies, 16 bytes each, into a ring of 4 x 1 KB that a warp has for itself, so the main loop
// has no block barrier. In flight: 3 KB a warp x 26 warps (N = 13824: 3456 warps on 132 SMs, one wave at 4 blocks an SM)
// = 78 KB an SM, twice latency x bandwidth. Warps split K in up to 8, so that 160 row tiles (N = 2560) still give 1280 warps.
// They meet in int32 sums in shared memory, one for each group, by atomic adds, which in integers have no order; the float
// sum over groups, which has one, is taken at the end.
// The copies start before anything else: a single token is quantized by every block for itself while they are under way
// (5 KB from the L2 cache). With `overlap` the kernel starts before the one ahead of it has ended, and asks the L2 cache for its
// first stages: that is right whoever writes the weights, where copies into shared memory would need a promise that nobody does.
// Activations lie in shared memory by fields (codes.h), so that a B fragment is one 16-byte load without bank conflicts.
// Not measured: no GPU was there when this was written.
#include "decode_input.h"
#include "internal.h"

namespace qat::cuda {
namespace {

constexpr int64_t kFusedWidth = 16384;  // a longer token is quantized by a launch of its own
constexpr int64_t kWantedWarps = 2048;  // 15 an SM on a large GPU

enum class Groups { one, even, odd };  // of blocks of 64 in a group: pairs of blocks are multiplied unless they are odd

// Sums of each field of 2 bits.
template <int NT>
struct Sums {
  int32_t field[NT][4][4] = {};

  // A warp's share of a group's sums [tokens][16], and from zero again.
  __device__ __forceinline__ void flush(int32_t* sums, int tokens, int lane) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int32_t(&f)[4][4] = field[nt];
        const int token = nt * 8 + lane % 4 * 2 + i % 2;
        const int32_t sum = f[0][i] + (f[1][i] >> 2) + (f[2][i] >> 4) + (f[3][i] >> 6);
        if (token < tokens) atomic_add(sums + token * kRows + lane / 4 + i / 2 * 8, sum);
        f[0][i] = f[1][i] = f[2][i] = f[3][i] = 0;
      }
  }
};

// What a lane reads of the tokens: 16 bytes of each block. Lanes whose token is not there read zeros, in the banks where the token
// beside them, the last of an odd number, does not lie.
template <int NT, bool FUSED>
struct Tokens {
  const unsigned char* at[NT];
  int block[NT], stage[NT];  // bytes to the next one
  uint4 x[NT][2];            // of two blocks

  __device__ __forceinline__ Tokens(const unsigned char* x_shared, const unsigned char* zeros, int tokens, int splits, int split,
                                    int lane) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const int token = nt * 8 + lane / 4;
      const bool there = token < tokens;
      block[nt] = FUSED ? 64 : there ? tokens * 64 : tokens % 2 * 64;
      stage[nt] = there ? splits * 4 * tokens * 64 : 0;
      at[nt] = (there ? x_shared + split * 4 * tokens * 64 + token * 64 : zeros + 64) + lane % 4 * 16;
    }
  }
  __device__ __forceinline__ void take(int first) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) x[nt][i] = load_shared<uint4>(at[nt] + (first + i) * block[nt]);
  }
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) at[nt] += stage[nt];
  }
  __device__ __forceinline__ uint32_t word(int nt, int i, int f) const {
    const uint4& v = x[nt][i];
    return f == 0 ? v.x : f == 1 ? v.y : f == 2 ? v.z : v.w;
  }
};

// Blocks FIRST to LAST of two, of 16 rows times NT * 8 tokens. words: [block][upper and lower rows].
template <int FIRST, int LAST, int NT, bool FUSED>
__device__ __forceinline__ void multiply(const uint32_t (&words)[2][2], const Tokens<NT, FUSED>& tokens, Sums<NT>& sums) {
  constexpr bool kPair = FIRST != LAST;
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    const uint32_t mask = 0x03030303u << 2 * f;
    const uint32_t a[4] = {words[FIRST][0] & mask, words[FIRST][1] & mask, kPair ? words[LAST][0] & mask : 0u,
                           kPair ? words[LAST][1] & mask : 0u};
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
      mma_u8s8(sums.field[nt][f], a, {tokens.word(nt, FIRST, f), kPair ? tokens.word(nt, LAST, f) : 0u});
  }
}

// One output from the sums of its groups, `step` apart, and the tokens' own, `tokens` apart.
template <bool GROUPS>
__device__ __forceinline__ void finish(const Decode& p, const int32_t* sums, int step, const int32_t* offsets, int tokens,
                                       float divisor, const float* scales, int64_t row, int64_t token) {
  float y = 0.0f;
  if constexpr (GROUPS) {
    for (int g = 0; g < p.groups; ++g) y = accumulate(y, sums[g * step] - offsets[g * tokens], scales[g]);
    y = divide(y, divisor);
  } else {
    y = rescale(sums[0] - offsets[0], divisor, reciprocal(p.out.scale[row * p.out.scale_stride]));
  }
  if (p.out.bias) y = add(y, p.out.bias[row]);
  store_element(p.out.y, p.out.dtype, token * p.n + row, y);
}

template <int NT, bool FUSED, Groups GROUPS>
__global__ void __launch_bounds__(kBlock, NT > 1 ? 2 : 4) decode_kernel(const Decode p) {
  unsigned char* ring = shared_memory();
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * p.tokens;
  const int tokens = FUSED ? 1 : static_cast<int>(p.m - token0 < p.tokens ? p.m - token0 : p.tokens);
  const int tiles = kWarps / p.splits, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, split = warp & (p.splits - 1);
  const int tile = warp / p.splits;
  const Places at = places(p.blocks64, p.tokens, p.groups, tiles);
  unsigned char *x_shared = ring + at.x, *zeros = ring + at.zeros;
  int32_t *sums = reinterpret_cast<int32_t*>(ring + at.sums), *offsets = reinterpret_cast<int32_t*>(ring + at.offsets);
  float *scales = reinterpret_cast<float*>(ring + at.scales), *divisors = reinterpret_cast<float*>(ring + at.divisors);

  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * tiles * kRows, row0 = block_row + tile * kRows;
  unsigned char* own = ring + static_cast<std::size_t>(warp) * kStages * kStageBytes;
  const int stages = stage_blocks(p.blocks64) / 4, count = row0 < p.n ? (stages - split + p.splits - 1) / p.splits : 0;
  Fetcher fetcher(p, row0, split, lane);
  if (count > 0) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetcher.prefetch_stage(p, s);
  }
  const int group_sums = tokens * kRows, tile_sums = p.groups * group_sums;
  for (int i = static_cast<int>(threadIdx.x); i < tiles * tile_sums; i += kBlock) sums[i] = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.groups * tokens; i += kBlock) offsets[i] = 0;
  if (threadIdx.x < kZeros / 4) reinterpret_cast<uint32_t*>(zeros)[threadIdx.x] = 0;
  wait_for_previous();
  let_next_start();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count) fetcher.fetch(p, own + s * kStageBytes);
    commit_copies();
  }
  if (GROUPS != Groups::one) take_scales(p, block_row, scales);
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
  sum_codes(p, tokens, x_shared, offsets);

  int32_t* own_sums = sums + tile * tile_sums;
  Sums<NT> acc;
  Tokens<NT, FUSED> x(x_shared, zeros, tokens, p.splits, split, lane);
  const int r = lane / 4, block_step = p.splits * 4;
  const unsigned char* weights = own + r * kBytes + lane % 4 * 4;
  int place[4];  // of this lane's chunks
#pragma unroll
  for (int j = 0; j < 4; ++j) place[j] = (j ^ (r >> 1 & 3)) * 16;
  int block = split * 4;
  for (int first = 0; first < count; first += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (first + s >= count) break;
      wait_copies<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled next
      if (first + s + kStages - 1 < count) fetcher.fetch(p, own + (s + kStages - 1) % kStages * kStageBytes);
      commit_copies();
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        if (GROUPS != Groups::one && block + j >= p.blocks64) break;
        uint32_t words[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            words[i][half] = load_shared<uint32_t>(weights + place[j + i] + s * kStageBytes + half * 8 * kBytes);
        x.take(j);
        if constexpr (GROUPS == Groups::odd) {
          const int group = group_of(p, block + j);
          multiply<0, 0>(words, x, acc);
          acc.flush(own_sums + group * group_sums, tokens, lane);
          if (block + j + 1 >= p.blocks64) break;
          multiply<1, 1>(words, x, acc);
          acc.flush(own_sums + group_of(p, block + j + 1) * group_sums, tokens, lane);
        } else {
          multiply<0, 1>(words, x, acc);
          if (GROUPS == Groups::even && (j == 2 || group_of(p, block + 2) != group_of(p, block)))
            acc.flush(own_sums + group_of(p, block + j) * group_sums, tokens, lane);
        }
      }
      x.advance();
      block += block_step;
    }
  }
  if (GROUPS == Groups::one && count > 0) acc.flush(own_sums, tokens, lane);
  __syncthreads();

  for (int i = static_cast<int>(threadIdx.x); i < tiles * group_sums; i += kBlock) {
    const int row_of = i % kRows, token = i / kRows % tokens, tile_of = i / group_sums;
    const int64_t row = block_row + tile_of * kRows + row_of;
    if (row < p.n)
      finish<GROUPS != Groups::one>(p, sums + tile_of * tile_sums + token * kRows + row_of, group_sums, offsets + token, tokens,
                                    divisors[token], scales + row_of * p.groups, row, token0 + token);
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

template <int NT, bool FUSED, Groups GROUPS>
int run_groups(const Decode& d, cudaStream_t stream, bool overlap) {
  const dim3 grid = {static_cast<unsigned>(ceil_div<int64_t>(d.n, kRows * (kWarps / d.splits))),
                     static_cast<unsigned>(ceil_div<int64_t>(d.m, d.tokens))};
  const std::size_t shared = places(d.blocks64, d.tokens, d.groups, kWarps / d.splits).end;
  return launch(decode_kernel<NT, FUSED, GROUPS>, grid, kBlock, shared, stream, d, overlap);
}

template <int NT, bool FUSED>
int run(const Decode& d, cudaStream_t stream, bool overlap) {
  if (d.groups == 1) return run_groups<NT, FUSED, Groups::one>(d, stream, overlap);
  return d.group_blocks % 2 == 0 ? run_groups<NT, FUSED, Groups::even>(d, stream, overlap)
                                 : run_groups<NT, FUSED, Groups::odd>(d, stream, overlap);
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
  d.eight_rows = 8 * d.row_bytes;
  d.blocks64 = blocks_of_64(p);
  d.groups = static_cast<int>(p.groups);
  d.group_blocks = d.blocks64 / d.groups;
  d.group_factor = (0x80000000u + static_cast<uint32_t>(d.group_blocks) - 1) / static_cast<uint32_t>(d.group_blocks);
  d.eps = p.eps;
  d.wide = wide_rows(p.x, p.k, size_of(p.out.dtype));
  const int most = tokens_that_fit(p), slices = static_cast<int>(ceil_div<int64_t>(p.m, most));
  d.tokens = static_cast<int>(ceil_div<int64_t>(p.m, slices));
  d.splits = splits_of(p);
  if (packed_linear_fused(p)) return run<1, true>(d, stream, p.overlap && d.wide);
  return d.tokens <= 8 ? run<1, false>(d, stream, true) : run<2, false>(d, stream, true);
}

}  // namespace qat::cuda
