// Soft codes and their slopes of a latent weight, for any levels: what csrc/cpu/soft.h computes, operation by operation.
//
// Floor for fp32 [13824, 2560] in bf16: 141.6 MB in, 70.8 MB out twice: 94 us at 3 TB/s. A border costs about 35 operations a
// weight: two stay below the time of the memory, eight (two components) take about twice that.
// Design: four weights a thread, their row's few levels and borders through the L1 cache. beta is read here, not passed, so that
// a captured step anneals on.
// Not measured: no GPU was there when this was written.
#include "elements.h"

namespace qat::cuda {
namespace {

constexpr int kBlock = 256;

struct Soften {
  const float* w;  // [R, L]
  int64_t rows, length, chunks;  // chunks of 4 weights in a row
  const float *levels, *borders;  // [R, m], [R, m - 1]
  int64_t m;
  const float* beta;
  Dtype dtype;
  void *soft, *slope;  // [R, L]
};

// e^-z to a relative 2e-7 for z >= -87, 0 above 87; NaN stays NaN.
__device__ __forceinline__ float decay(float z) {
  const float x = z > 87.0f ? -87.0f : -z;
  const float shifted = add(mul(x, 1.44269504f), 12582912.0f), n = add(shifted, -12582912.0f);
  const float r = add(add(x, mul(n, -0.693359375f)), mul(n, 2.12194440e-4f));
  float p = add(8.3333338e-3f, mul(r, 1.3888889e-3f));
  p = add(4.1666668e-2f, mul(r, p));
  p = add(1.6666667e-1f, mul(r, p));
  p = add(0.5f, mul(r, p));
  p = add(1.0f, mul(r, p));
  p = add(1.0f, mul(r, p));
  return z > 87.0f ? 0.0f : mul(p, bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23));
}

template <bool WIDE>
__device__ __forceinline__ void store_chunk(void* y, Dtype dtype, int64_t at, int64_t count, const float (&value)[4]) {
  if (WIDE && dtype == Dtype::f32) {
    *reinterpret_cast<uint4*>(static_cast<float*>(y) + at) = {float_to_bits(value[0]), float_to_bits(value[1]),
                                                              float_to_bits(value[2]), float_to_bits(value[3])};
  } else if (WIDE) {
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool bf16 = dtype == Dtype::bf16;
      const uint32_t low = bf16 ? float_to_bfloat(value[2 * i]) : float_to_half(value[2 * i]);
      const uint32_t high = bf16 ? float_to_bfloat(value[2 * i + 1]) : float_to_half(value[2 * i + 1]);
      words[i] = low | high << 16;
    }
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(y) + at) = {words[0], words[1]};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) store_element(y, dtype, at + i, value[i]);
  }
}

// WIDE: rows are aligned and hold whole chunks.
template <bool WIDE>
__global__ void __launch_bounds__(kBlock) soften(const Soften p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + static_cast<int>(threadIdx.x);
  if (index >= p.rows * p.chunks) return;
  const int64_t row = index / p.chunks, begin = (index - row * p.chunks) * 4;
  const Chunk<float> w = load_chunk<WIDE>(p.w + row * p.length, begin, p.length);
  const float *level = p.levels + row * p.m, *border = p.borders + row * (p.m - 1), beta = *p.beta;
  const float middle = mul(add(level[0], level[p.m - 1]), 0.5f);
  float sum[4] = {middle, middle, middle, middle}, slope[4] = {};
  for (int64_t b = 0; b + 1 < p.m; ++b) {
    const float apart = add(level[b + 1], -level[b]);
    const bool there = apart > 0.0f;  // levels that are equal have nothing between them
    const float factor = there ? divide(beta, apart) : 0.0f, half = mul(apart, 0.5f), steep = there ? beta : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float z = mul(add(w[i], -border[b]), factor), e = decay(magnitude(z)), part = reciprocal(add(1.0f, e));
      const float step = mul(mul(add(1.0f, -e), part), half);
      sum[i] = add(sum[i], bits_to_float(float_to_bits(step) | (float_to_bits(z) & 0x80000000u)));
      slope[i] = add(slope[i], mul(mul(mul(e, part), part), steep));
    }
  }
  store_chunk<WIDE>(p.soft, p.dtype, row * p.length + begin, p.length - begin, sum);
  store_chunk<WIDE>(p.slope, p.dtype, row * p.length + begin, p.length - begin, slope);
}

}  // namespace

int soften_weight(const float* w, int64_t rows, int64_t length, const float* levels, const float* borders, int64_t m,
                  const float* beta, Dtype dtype, void* soft, void* slope, cudaStream_t stream) {
  if (rows == 0 || length == 0) return 0;
  if (rows < 0 || length < 0 || m < 2) return kInvalidValue;
  const Soften p = {w, rows, length, ceil_div<int64_t>(length, 4), levels, borders, m, beta, dtype, soft, slope};
  const bool wide = wide_rows(w, length, sizeof(float)) && aligned(soft, 16) && aligned(slope, 16);
  const dim3 grid = {static_cast<unsigned>(ceil_div<int64_t>(rows * p.chunks, kBlock))};
  return launch(wide ? soften<true> : soften<false>, grid, kBlock, 0, stream, p);
}

}  // namespace qat::cuda
