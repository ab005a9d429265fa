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
// Where tiles are too few for the device, K is split among blocks as well (plan.cu): each writes the int32 sums of its part, and
// split.cu adds them, which is exact, and makes y of them.
// Not measured: no GPU was there when this was written.
#include "internal.h"
#include "operands.h"
#include "outputs.h"
#include "split.h"

namespace qat::cuda {
namespace {

constexpr int kStages = 4;
constexpr int kSwath = 8;  // row tiles that share a pass over the columns

struct Gemm {
  Operand a, b;
  Target target;
  int groups, group_stages;
  int split_stages;  // of a block
};

template <int BM_, int BN_, int WM_, int WN_, bool PACKED_, bool GROUPS_, bool WIDE_ = true>
struct Shape {
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_;
  static constexpr bool PACKED = PACKED_, GROUPS = GROUPS_, WIDE = WIDE_;
  static constexpr int kThreads = BM / WM * (BN / WN) * kWarp;
  static constexpr int kBytesA = BM * kDepth, kBytesB = BN * (PACKED ? kDepth / 4 : kDepth);
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr std::size_t kShared = static_cast<std::size_t>(kStages) * kStageBytes;
  static constexpr int MI = WM / 16, NJ = WN / 8;
  using Rows = SumRows<WN, 32>;  // 16 of them for each warp, in the place of the stages
  static_assert(kShared <= kMostShared && 16 * Rows::kPitch * kThreads / kWarp <= kShared);
  using A = Stages<BM, kThreads, false, GROUPS, WIDE>;
  using B = Stages<BN, kThreads, PACKED, GROUPS, WIDE>;
};

// What a lane reads of a stage: bytes from its start, for each half of the codes.
template <class S>
struct Lane {
  int a[2], b[2];

  __device__ __forceinline__ Lane(int row, int column, int lane) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      a[s] = place(row + lane % 16, s * 2 + lane / 16);
      b[s] = S::kBytesA + (S::PACKED ? (column + lane / 4) * 16 + lane % 4 * 4
                                     : place(column + lane % 8 + lane / 16 * 8, s * 2 + lane / 8 % 2));
    }
  }
};

// Fragments of B for a stage and all columns of the warp: b[s] for half s of the codes.
template <class S>
__device__ __forceinline__ void expand_b(const unsigned char* words, uint32_t (&b)[2][S::NJ][2]) {
#pragma unroll
  for (int j = 0; j < S::NJ; ++j) {
    uint32_t out[4];
    expand_word(load_shared<uint32_t>(words + j * 8 * 16), out);
    b[0][j][0] = out[0];
    b[0][j][1] = out[1];
    b[1][j][0] = out[2];
    b[1][j][1] = out[3];
  }
}

template <class S>
__device__ __forceinline__ void load_b(const unsigned char* rows, uint32_t (&b)[S::NJ][2]) {
#pragma unroll
  for (int j = 0; j < S::NJ; j += 2) {
    uint32_t r[4];
    load_matrices(r, rows + j * 8 * kDepth);
    b[j][0] = r[0];
    b[j][1] = r[1];
    b[j + 1][0] = r[2];
    b[j + 1][1] = r[3];
  }
}

template <class S>
__device__ __forceinline__ void multiply(const unsigned char* stage, const Lane<S>& lane, int32_t (&acc)[S::MI][S::NJ][4]) {
  uint32_t b[2][S::NJ][2];
  if constexpr (S::PACKED) expand_b<S>(stage + lane.b[0], b);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if constexpr (!S::PACKED) load_b<S>(stage + lane.b[s], b[s]);
#pragma unroll
    for (int i = 0; i < S::MI; ++i) {
      uint32_t a[4];
      load_matrices(a, stage + lane.a[s] + i * 16 * kDepth);
#pragma unroll
      for (int j = 0; j < S::NJ; ++j) mma_s8(acc[i][j], a, b[s][j]);
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
      scale[j][e] = n < p.target.n ? p.target.out.scale[n * p.target.out.scale_stride + group] : 0.0f;
    }
}

// A warp's sums by way of shared memory, 16 rows at a time.
template <class S>
__device__ __forceinline__ void write(const Target& p, unsigned char* own, int64_t row0, int64_t column0, int lane,
                                      const int32_t (&acc)[S::MI][S::NJ][4], const float (&sums)[S::MI][S::NJ][4]) {
  using Rows = typename S::Rows;
  const int unit = lane % Rows::kUnits;
  const Factors<S::GROUPS> factors(p, column0 + unit * kUnit);
#pragma unroll 1
  for (int part = 0; part < S::MI; ++part) {
    __syncwarp();  // all lanes have read the part before
#pragma unroll
    for (int i = 0; i < S::MI; ++i) {
      if (i != part) continue;
#pragma unroll
      for (int j = 0; j < S::NJ; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t v[2];
#pragma unroll
          for (int h = 0; h < 2; ++h)
            v[h] = S::GROUPS ? float_to_bits(sums[i][j][half * 2 + h]) : static_cast<uint32_t>(acc[i][j][half * 2 + h]);
          unsigned char* to = own + Rows::place(lane / 4 + half * 8, j * 2 + lane % 4 / 2) + lane % 2 * 8;
          store_shared(to, v[0] | static_cast<uint64_t>(v[1]) << 32);
        }
    }
    __syncwarp();
    write_rows<Rows>(p, factors, own, unit, lane / Rows::kUnits, kWarp / Rows::kUnits, 16, row0 + part * 16);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads) gemm_kernel(const Gemm p) {
  unsigned char* shared = shared_memory();
  const auto row_tiles = static_cast<unsigned>(ceil_div<int64_t>(p.target.m, S::BM)),
             column_tiles = static_cast<unsigned>(ceil_div<int64_t>(p.target.n, S::BN));
  const unsigned swath = blockIdx.x / (kSwath * column_tiles), inside = blockIdx.x - swath * kSwath * column_tiles;
  const unsigned left_tiles = row_tiles - swath * kSwath, height = left_tiles < kSwath ? left_tiles : kSwath;
  const int64_t row0 = int64_t{swath * kSwath + inside % height} * S::BM, column0 = int64_t{inside / height} * S::BN;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = warp / (S::BN / S::WN) * S::WM, column = warp % (S::BN / S::WN) * S::WN;  // of the warp, in the block
  typename S::A a(p.a, row0);
  typename S::B b(p.b, column0);
  int stages = p.groups * p.group_stages;
  if constexpr (!S::GROUPS) {
    const int before = static_cast<int>(blockIdx.y) * p.split_stages;
    a.skip(before);
    b.skip(before);
    stages = stages - before < p.split_stages ? stages - before : p.split_stages;
  }
  const auto fetch = [&](int slot) {
    a.fetch(shared + slot * S::kStageBytes, p.a);
    b.fetch(shared + slot * S::kStageBytes + S::kBytesA, p.b);
  };
#pragma unroll(S::WIDE ? kStages - 1 : 1)
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < stages) fetch(s);
    commit_copies();
  }

  const Lane<S> mine(row, column, lane);
  int32_t acc[S::MI][S::NJ][4] = {};
  float sums[S::MI][S::NJ][4] = {};
  float scale[S::NJ][2] = {};
  int left = p.group_stages, group = 0;  // left: of the group
  for (; stages > 0; stages -= kStages) {
#pragma unroll(S::WIDE ? kStages : 1)
    for (int s = 0; s < kStages; ++s) {
      if (stages <= s) break;
      wait_copies<kStages - 2>();
      __syncthreads();  // all threads' copies are there, and all have read the stage that is filled next
      if (stages > s + kStages - 1) fetch((s + kStages - 1) % kStages);
      commit_copies();
      if (S::GROUPS && left == 1) take_scales<S>(p, column0 + column, group, lane, scale);
      multiply<S>(shared + s * S::kStageBytes, mine, acc);
      if (S::GROUPS && --left == 0) {
        fold<S>(acc, sums, scale);
        left = p.group_stages;
        ++group;
      }
    }
  }
  __syncthreads();  // all have read the last stage
  if (!S::GROUPS && gridDim.y > 1) let_next_start();  // which adds the splits' sums
  write<S>(p.target, shared + warp * 16 * S::Rows::kPitch, row0 + row, column0 + column, lane, acc, sums);
}

template <class S>
int run(const Gemm& p, unsigned splits, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.target.m, S::BM) * ceil_div<int64_t>(p.target.n, S::BN);
  return launch(gemm_kernel<S>, {static_cast<unsigned>(blocks), splits}, S::kThreads, S::kShared, stream, p);
}

template <bool PACKED>
int choose(const Gemm& p, Tile tile, unsigned splits, cudaStream_t stream) {
  if (!p.a.wide || !p.b.wide)
    return p.groups > 1 ? run<Shape<64, 64, 32, 32, PACKED, true, false>>(p, splits, stream)
                        : run<Shape<64, 64, 32, 32, PACKED, false, false>>(p, splits, stream);
  if (p.groups > 1)
    return tile == Tile::small ? run<Shape<64, 64, 32, 32, PACKED, true>>(p, splits, stream)
                               : run<Shape<128, 128, 64, 32, PACKED, true>>(p, splits, stream);
  switch (tile) {
    case Tile::small: return run<Shape<64, 64, 32, 32, PACKED, false>>(p, splits, stream);
    case Tile::medium: return run<Shape<128, 128, 64, 32, PACKED, false>>(p, splits, stream);
    case Tile::large: return run<Shape<128, 256, 64, 64, PACKED, false>>(p, splits, stream);
  }
  return kInvalidValue;
}

Operand codes_operand(const int8_t* data, int64_t rows, int64_t width, int64_t groups) {
  const int length = static_cast<int>(width / groups);
  return {reinterpret_cast<const uint8_t*>(data), rows, width, length,
          aligned(data, 16) && width % 16 == 0 && length % 16 == 0};
}

Gemm problem(int64_t k, int64_t groups) {
  Gemm p = {};
  p.groups = static_cast<int>(groups);
  p.group_stages = static_cast<int>(ceil_div<int64_t>(k / groups, kDepth));
  return p;
}

template <bool PACKED>
int multiply(Gemm p, const Target& whole, const Plan& plan, int32_t* partial, cudaStream_t stream) {
  const Splits splits = splits_of(whole, p.groups * p.group_stages, plan.splits, partial);
  p.target = splits.target;
  p.split_stages = splits.stages;
  const int error = choose<PACKED>(p, plan.tile, static_cast<unsigned>(splits.count), stream);
  return error ? error : add_splits(splits, whole, stream);
}

}  // namespace

int gemm(const Linear& p, const Plan& plan, cudaStream_t stream) {
  Gemm g = problem(p.k, p.groups);
  g.a = codes_operand(p.codes, p.m, p.k, p.groups);
  g.b = codes_operand(p.t, p.n, p.k, p.groups);
  return multiply<false>(g, target_of(p.out, p.divisor, p.m, p.n, p.raw), plan, p.partial, stream);
}

int packed_gemm(const PackedLinear& p, const Plan& plan, cudaStream_t stream) {
  Gemm g = problem(p.k, p.groups);
  g.a = codes_operand(p.codes, p.m, padded_width(p.k, p.groups), p.groups);
  const int64_t row_bytes = ceil_div<int64_t>(p.k, 4);
  g.b = {p.packed, p.n, row_bytes, static_cast<int>(p.k / p.groups),
         aligned(p.packed, 16) && row_bytes % 16 == 0 && (p.groups == 1 || p.k / p.groups % 64 == 0)};
  return multiply<true>(g, target_of(p.out, p.divisor, p.m, p.n, false), plan, p.partial, stream);
}

}  // namespace qat::cuda
