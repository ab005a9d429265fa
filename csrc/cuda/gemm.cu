// Many tokens: y [M, N] = x_q [M, K] . t [N, K]^T on int8 tensor cores, t as int8 (training) or 2-bit bytes (inference).
//
// Floor at 2048 x 13824 x 2560: 145 Gop = 92 us at the paper rate of 1580 Top/s; 28 + 57 MB moved = 20 us. So arithmetic
// is the limit, and this kernel's own one is mma.sync, which reaches about 60 % of a Hopper tensor core's int8 rate
// (gemm_hopper.cu has the rest) and all of an Ampere's.
// Design: asynchronous copies into 4 stages of 64 codes along K, one barrier a stage, warp tiles of 64 x 64: for 32 mma of
// 32 codes a warp reads 4 KB of shared memory, 32 cycles of an SM at 128 bytes, where the mma take 64 (Ampere) or about 50
// (Hopper). ldmatrix rows are swizzled, so no bank conflicts. 2-bit weights stay packed in shared memory, a quarter of the
// bytes, and are expanded in registers by 3 instructions for 4 codes: 48 for those 32 mma, which leaves the ALU half idle.
// With groups the int32 sums are folded into float ones at the end of each group, in the order of the reference; those
// double registers, so warps then take 64 x 32.
// Blocks walk down 8 row tiles before the next column tile, which keeps both operands in the L2 cache.
// Not measured: no GPU was there when this was written.
#include "internal.h"
#include "operands.h"

namespace qat::cuda {
namespace {

constexpr int kStages = 4;
constexpr int kSwath = 8;  // row tiles that share a pass over the columns

struct Gemm {
  Operand a, b;
  const float* divisor;
  Output out;
  int64_t m, n;
  int groups, group_stages;
  bool raw, pairs;  // pairs: y is written two elements at a time
};

template <int BM_, int BN_, int WM_, int WN_, bool PACKED_, bool GROUPS_>
struct Shape {
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_;
  static constexpr bool PACKED = PACKED_, GROUPS = GROUPS_;
  static constexpr int kThreads = BM / WM * (BN / WN) * kWarp;
  static constexpr int kBytesA = BM * kDepth, kBytesB = BN * (PACKED ? kDepth / 4 : kDepth);
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr std::size_t kShared = static_cast<std::size_t>(kStages) * kStageBytes;
  static_assert(kShared <= kMostShared);
  static constexpr int MI = WM / 16, NJ = WN / 8;
};

template <class S>
__device__ __forceinline__ void fetch(const Gemm& p, unsigned char* stage, int64_t row0, int64_t column0, Cursor& a,
                                      Cursor& b) {
  fetch_codes<S::BM, S::kThreads>(stage, p.a, row0, a);
  if constexpr (S::PACKED) {
    fetch_bits<S::BN, S::kThreads>(stage + S::kBytesA, p.b, column0, b);
  } else {
    fetch_codes<S::BN, S::kThreads>(stage + S::kBytesA, p.b, column0, b);
  }
  a.advance(p.a);
  b.advance(p.b);
}

// Fragments of B for 32 codes (half s of the stage) and all columns of the warp.
template <class S>
__device__ __forceinline__ void take_b(const unsigned char* stage, int column, int s, int lane, uint32_t (&b)[S::NJ][2]) {
  if constexpr (S::PACKED) {
#pragma unroll
    for (int j = 0; j < S::NJ; ++j) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(stage + (column + j * 8 + lane / 4) * 16 + s * 8);
      b[j][0] = expand_one(words[0], lane % 4);
      b[j][1] = expand_one(words[1], lane % 4);
    }
  } else {
#pragma unroll
    for (int j = 0; j < S::NJ; j += 2) {
      uint32_t r[4];
      load_matrices(r, stage + place(column + j * 8 + lane % 8 + lane / 16 * 8, s * 2 + lane / 8 % 2));
      b[j][0] = r[0];
      b[j][1] = r[1];
      b[j + 1][0] = r[2];
      b[j + 1][1] = r[3];
    }
  }
}

template <class S>
__device__ __forceinline__ void multiply(const unsigned char* stage, int row, int column, int lane,
                                         int32_t (&acc)[S::MI][S::NJ][4]) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    uint32_t b[S::NJ][2];
    take_b<S>(stage + S::kBytesA, column, s, lane, b);
#pragma unroll
    for (int i = 0; i < S::MI; ++i) {
      uint32_t a[4];
      load_matrices(a, stage + place(row + i * 16 + lane % 16, s * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < S::NJ; ++j) mma_s8(acc[i][j], a, b[j]);
    }
  }
}

// The group's sums into the float ones; column scales were loaded before the group's last stage was multiplied.
template <class S>
__device__ __forceinline__ void fold(int32_t (&acc)[S::MI][S::NJ][4], float (&y)[S::MI][S::NJ][4],
                                     const float (&scale)[S::NJ][2]) {
#pragma unroll
  for (int i = 0; i < S::MI; ++i)
#pragma unroll
    for (int j = 0; j < S::NJ; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        y[i][j][e] = accumulate(y[i][j][e], acc[i][j][e], scale[j][e % 2]);
        acc[i][j][e] = 0;
      }
}

template <class S>
__device__ __forceinline__ void take_scales(const Gemm& p, int64_t column, int group, int lane, float (&scale)[S::NJ][2]) {
#pragma unroll
  for (int j = 0; j < S::NJ; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t n = column + j * 8 + lane % 4 * 2 + e;
      scale[j][e] = n < p.n ? p.out.scale[n * p.out.scale_stride + group] : 0.0f;
    }
}

// Two neighbouring elements of y; the second may lie outside.
__device__ __forceinline__ void store_pair(const Gemm& p, int64_t row, int64_t column, float first, float second) {
  const int64_t at = row * p.n + column;
  if (!p.pairs) {
    store_element(p.out.y, p.out.dtype, at, first);
    if (column + 1 < p.n) store_element(p.out.y, p.out.dtype, at + 1, second);
  } else if (p.out.dtype == Dtype::f32) {
    float* y = static_cast<float*>(p.out.y) + at;
    *reinterpret_cast<uint64_t*>(y) = float_to_bits(first) | static_cast<uint64_t>(float_to_bits(second)) << 32;
  } else {
    const bool bf16 = p.out.dtype == Dtype::bf16;
    const uint32_t low = bf16 ? float_to_bfloat(first) : float_to_half(first),
                   high = bf16 ? float_to_bfloat(second) : float_to_half(second);
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out.y) + at) = low | high << 16;
  }
}

template <class S>
__device__ __forceinline__ void write(const Gemm& p, int64_t row0, int64_t column0, int lane,
                                      const int32_t (&acc)[S::MI][S::NJ][4], const float (&sums)[S::MI][S::NJ][4]) {
#pragma unroll
  for (int j = 0; j < S::NJ; ++j) {
    const int64_t column = column0 + j * 8 + lane % 4 * 2, next = column + 1 < p.n ? column + 1 : column;
    if (column >= p.n) continue;
    float inverse[2] = {}, bias[2] = {};
    if (!p.raw && !S::GROUPS) {
      inverse[0] = reciprocal(p.out.scale[column * p.out.scale_stride]);
      inverse[1] = reciprocal(p.out.scale[next * p.out.scale_stride]);
    }
    if (p.out.bias) {
      bias[0] = p.out.bias[column];
      bias[1] = p.out.bias[next];
    }
#pragma unroll
    for (int i = 0; i < 2 * S::MI; ++i) {
      const int64_t row = row0 + i * 8 + lane / 4;
      if (row >= p.m) continue;
      const int e = i % 2 * 2;
      if (p.raw) {
        int32_t* y = static_cast<int32_t*>(p.out.y) + row * p.n + column;
        y[0] = acc[i / 2][j][e];
        if (column + 1 < p.n) y[1] = acc[i / 2][j][e + 1];
        continue;
      }
      float y[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float divisor = p.divisor[row];
        y[h] = S::GROUPS ? divide(sums[i / 2][j][e + h], divisor) : rescale(acc[i / 2][j][e + h], divisor, inverse[h]);
        if (p.out.bias) y[h] = add(y[h], bias[h]);
      }
      store_pair(p, row, column, y[0], y[1]);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads) gemm_kernel(const Gemm p) {
  unsigned char* shared = shared_memory();
  const int64_t row_tiles = ceil_div<int64_t>(p.m, S::BM), column_tiles = ceil_div<int64_t>(p.n, S::BN);
  const int64_t swath = blockIdx.x / (kSwath * column_tiles), inside = blockIdx.x - swath * kSwath * column_tiles;
  const int64_t height = row_tiles - swath * kSwath < kSwath ? row_tiles - swath * kSwath : kSwath;
  const int64_t row0 = (swath * kSwath + inside % height) * S::BM, column0 = inside / height * S::BN;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = warp / (S::BN / S::WN) * S::WM, column = warp % (S::BN / S::WN) * S::WN;  // of the warp, in the block
  const int stages = p.groups * p.group_stages;
  Cursor a, b;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < stages) fetch<S>(p, shared + s * S::kStageBytes, row0, column0, a, b);
    commit_copies();
  }

  int32_t acc[S::MI][S::NJ][4] = {};
  float sums[S::MI][S::NJ][4] = {};
  float scale[S::NJ][2] = {};
  int left = p.group_stages;  // of the group
  for (int it = 0; it < stages; ++it) {
    wait_copies<kStages - 2>();
    __syncthreads();  // all threads' copies are there, and all have read the stage that is filled next
    if (it + kStages - 1 < stages) fetch<S>(p, shared + (it + kStages - 1) % kStages * S::kStageBytes, row0, column0, a, b);
    commit_copies();
    if (S::GROUPS && left == 1) take_scales<S>(p, column0 + column, it / p.group_stages, lane, scale);
    multiply<S>(shared + it % kStages * S::kStageBytes, row, column, lane, acc);
    if (S::GROUPS && --left == 0) {
      fold<S>(acc, sums, scale);
      left = p.group_stages;
    }
  }
  write<S>(p, row0 + row, column0 + column, lane, acc, sums);
}

template <class S>
int run(const Gemm& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.m, S::BM) * ceil_div<int64_t>(p.n, S::BN);
  return launch(gemm_kernel<S>, {static_cast<unsigned>(blocks)}, S::kThreads, S::kShared, stream, p);
}

template <bool PACKED>
int choose(const Gemm& p, Tile tile, cudaStream_t stream) {
  if (p.groups > 1)
    return tile == Tile::small ? run<Shape<64, 64, 32, 32, PACKED, true>>(p, stream)
                               : run<Shape<128, 128, 64, 32, PACKED, true>>(p, stream);
  switch (tile) {
    case Tile::small: return run<Shape<64, 64, 32, 32, PACKED, false>>(p, stream);
    case Tile::medium: return run<Shape<128, 128, 64, 32, PACKED, false>>(p, stream);
    case Tile::large: return run<Shape<128, 256, 64, 64, PACKED, false>>(p, stream);
  }
  return kInvalidValue;
}

Operand codes_operand(const int8_t* data, int64_t rows, int64_t width, int64_t groups) {
  const int64_t length = width / groups;
  return {reinterpret_cast<const uint8_t*>(data), rows, width, length,
          aligned(data, 16) && width % 16 == 0 && length % 16 == 0};
}

Gemm problem(const Output& out, const float* divisor, int64_t m, int64_t n, int64_t k, int64_t groups) {
  Gemm p = {};
  p.out = out;
  p.divisor = divisor;
  p.m = m;
  p.n = n;
  p.groups = static_cast<int>(groups);
  p.group_stages = static_cast<int>(ceil_div<int64_t>(k / groups, kDepth));
  p.pairs = n % 2 == 0 && aligned(out.y, out.dtype == Dtype::f32 ? 8 : 4);
  return p;
}

}  // namespace

// Large tiles once they fill a large GPU's 132 SMs, and medium ones once they nearly do.
Tile gemm_tile(int64_t m, int64_t n, int64_t groups) {
  const int64_t rows = ceil_div<int64_t>(m, 128);
  if (groups == 1 && rows * ceil_div<int64_t>(n, 256) >= 132) return Tile::large;
  return rows * ceil_div<int64_t>(n, 128) >= 100 ? Tile::medium : Tile::small;
}

int gemm(const Linear& p, Tile tile, cudaStream_t stream) {
  Gemm g = problem(p.out, p.divisor, p.m, p.n, p.k, p.groups);
  g.a = codes_operand(p.codes, p.m, p.k, p.groups);
  g.b = codes_operand(p.t, p.n, p.k, p.groups);
  g.raw = p.raw;
  if (p.raw) g.out.bias = nullptr;
  return choose<false>(g, tile, stream);
}

int packed_gemm(const PackedLinear& p, Tile tile, cudaStream_t stream) {
  Gemm g = problem(p.out, p.divisor, p.m, p.n, p.k, p.groups);
  g.a = codes_operand(p.codes, p.m, padded_width(p.k, p.groups), p.groups);
  const int64_t row_bytes = ceil_div<int64_t>(p.k, 4);
  g.b = {p.packed, p.n, row_bytes, p.k / p.groups,
         aligned(p.packed, 16) && row_bytes % 16 == 0 && (p.groups == 1 || p.k / p.groups % 64 == 0)};
  return choose<true>(g, tile, stream);
}

}  // namespace qat::cuda
