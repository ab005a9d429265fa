// The last launch of a product whose K was split among blocks: the splits' int32 sums, added, rescaled and written.
//
// Integers are exact in any order, so y has the bits of one block's sums: no atomics, nothing to be cleared before, and the same at
// every call. Floor: 4 bytes a sum written by the product and read here, from the L2 cache (17 MB are a wave of the largest tiles).
// It is launched while the product still writes (programmatic launch), and waits for that.
// Rejected: adding by the last block of a tile, which needs counters that something has to clear, and leaves all other
// multiprocessors idle meanwhile.
// Not measured: no GPU was there when this was written.
#include "split.h"

namespace qat::cuda {
namespace {

constexpr int kRows = 4;   // of a block, a warp each, 256 outputs wide
constexpr int kAhead = 4;  // splits that a thread reads at once

struct Sums {
  const int32_t* partial;
  int64_t pitch, stride;  // sums from a row to the next, and from a split to the next
  int splits;
  Target target;
};

__device__ __forceinline__ void add_four(const uint4& four, int32_t (&sums)[4]) {
  sums[0] += static_cast<int32_t>(four.x);
  sums[1] += static_cast<int32_t>(four.y);
  sums[2] += static_cast<int32_t>(four.z);
  sums[3] += static_cast<int32_t>(four.w);
}

// A lane writes 8 outputs. Two neighbours read their 16 sums as halves of sectors that are read once, and exchange what is the
// other's.
template <class T>
__global__ void __launch_bounds__(kRows* kWarp) add_kernel(const Sums p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool odd = lane % 2 != 0;
  const int64_t tile = int64_t{blockIdx.x} * kWarp * kUnit, column = tile + lane / 2 * 2 * kUnit + lane % 2 * 4;
  const int64_t next = column + kUnit < p.pitch ? kUnit : 0;  // past a row's end any sums will do
  const Factors<false> factors(p.target, tile + lane * kUnit);
  wait_for_previous();
  for (int64_t row = int64_t{blockIdx.y} * kRows + threadIdx.x / kWarp; row < p.target.m; row += int64_t{gridDim.y} * kRows) {
    const int32_t* from = p.partial + row * p.pitch + (column < p.pitch ? column : 0);
    int32_t low[4] = {}, high[4] = {}, sums[kUnit];
#pragma unroll 1
    for (int s = 0; s < p.splits; s += kAhead) {
      uint4 fours[kAhead][2] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i, from += p.stride) {
        if (s + i >= p.splits) continue;
        fours[i][0] = load_fresh(from);
        fours[i][1] = load_fresh(from + next);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        add_four(fours[i][0], low);
        add_four(fours[i][1], high);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t got = shuffle_xor(odd ? low[i] : high[i], 1);
      sums[i] = odd ? got : low[i];
      sums[i + 4] = odd ? high[i] : got;
    }
    if (factors.count > 0) write_unit<T>(p.target, factors, row, sums);
  }
}

template <class T>
int add(const Sums& p, cudaStream_t stream) {
  const int64_t columns = ceil_div<int64_t>(p.target.n, kUnit * kWarp), rows = ceil_div<int64_t>(p.target.m, kRows);
  const int64_t enough = ceil_div<int64_t>(8 * multiprocessors(), columns);  // eight blocks a multiprocessor
  const dim3 grid = {static_cast<unsigned>(columns), static_cast<unsigned>(rows < enough ? rows : enough)};
  return launch(add_kernel<T>, grid, kRows * kWarp, 0, stream, p, true);
}

int64_t pitch_of(int64_t n) { return ceil_div<int64_t>(n, kUnit) * kUnit; }

}  // namespace

Splits splits_of(const Target& whole, int stages, int wanted, int32_t* partial) {
  Splits s = {whole, 1, stages};
  if (wanted <= 1 || !partial) return s;
  s.stages = ceil_div(stages, wanted);
  s.count = ceil_div(stages, s.stages);
  if (s.count == 1) return s;
  s.target = target_of({partial, Dtype::f32, nullptr, 0, nullptr}, nullptr, whole.m, pitch_of(whole.n), true);
  return s;
}

int add_splits(const Splits& splits, const Target& whole, cudaStream_t stream) {
  if (splits.count == 1) return 0;
  const int64_t pitch = splits.target.n;
  const Sums p = {static_cast<const int32_t*>(splits.target.out.y), pitch, whole.m * pitch, splits.count, whole};
  if (whole.raw) return add<int32_t>(p, stream);
  switch (whole.out.dtype) {
    case Dtype::f32: return add<float>(p, stream);
    case Dtype::bf16: return add<Bf16>(p, stream);
    case Dtype::f16: return add<F16>(p, stream);
  }
  return kInvalidValue;
}

int64_t partial_bytes(int64_t m, int64_t n, int splits) { return splits > 1 ? splits * m * pitch_of(n) * int64_t{4} : 0; }

}  // namespace qat::cuda
