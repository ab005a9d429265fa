// Activation quantization: x [M, K] to int8 codes and one divisor a token (or one for all), an RMS norm in front if asked.
//
// Floor: K (sizeof(x) + 1) bytes a token; at 4.3 TB/s, 14.6 us for 8192 x 2560 bf16 and 39.5 us for 8192 x 6912.
// Design: each token is read once, 16 bytes a load, all loads of a row issued before the first use, and stays in registers
// between the maximum and the rounding. A warp takes a row of up to 12 loads a lane (no barrier at all), a block of 256 a
// longer one. In flight on an SM for K = 2560 bf16: 32 warps (64 registers) x 5 KB = 160 KB, four times what
// latency x bandwidth asks for (about 40 KB). Arithmetic: about 7 instructions an element (convert, max, mul, add, and
// 3/4 of a prmt), a third of the issue slots in that time; no F2I, which runs at a quarter of the rate.
// Rows beyond the registers' reach, or not aligned to 16 bytes, are read twice and by elements.
// Not measured: no GPU was there when this was written.
#include "codes.h"
#include "internal.h"
#include "reduce.h"

namespace qat::cuda {
namespace {

enum class Phase { token, measure, given };  // measure and given: the two launches of one scale for all tokens

template <class T>
struct Rows {
  const T* x;
  const T* norm_weight;
  int8_t* codes;
  float *divisor, *scale;
  uint32_t* absmax;  // of the whole tensor, as bits
  int64_t m, k;
  int64_t groups, length;  // of interleaved codes
  int64_t stride;          // bytes of a row of codes
  float eps, norm_eps;
  Phase phase;
  Order order;
  bool wide;  // x is read by 16 bytes, and codes are written by 4 or 8
};

// One code of any row.
template <class T>
__device__ __forceinline__ void store_one(const Rows<T>& p, int8_t* row, int64_t at, float value, float divisor) {
  if (p.order != Order::natural) {
    const int64_t group = at / p.length, inside = at - group * p.length;
    at = group * (p.stride / p.groups) + inside / 64 * 64 + interleaved(static_cast<int>(inside % 64), p.order);
  }
  row[at] = static_cast<int8_t>(code_bits(value, divisor) & code_mask(divisor));
}

// The zeros between the groups of an interleaved row.
template <class T>
__device__ void store_padding(const Rows<T>& p, int64_t row, int thread, int threads) {
  const int64_t padded = p.stride / p.groups, missing = padded - p.length;
  for (int64_t i = thread; i < missing * p.groups; i += threads) {
    const int64_t inside = p.length + i % missing;
    const int place = interleaved(static_cast<int>(inside % 64), p.order);
    p.codes[row * p.stride + i / missing * padded + inside / 64 * 64 + place] = 0;
  }
}

template <class T>
__device__ __forceinline__ Chunk<T> normalize(const Rows<T>& p, Chunk<T> chunk, int64_t begin, float factor) {
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) {
    if (begin + i < p.k) from_float(mul(to_float(p.norm_weight[begin + i]), rounded<T>(mul(chunk[i], factor))), chunk.v[i]);
  }
  return chunk;
}

// THREADS take one row, each LOADS chunks of it, 16 bytes at a time; LOADS = 0 is a row of any length and alignment, which
// is loaded anew at each use. NORM: the chunks are normalized first.
template <class T, int THREADS, int LOADS, bool NORM>
__global__ void __launch_bounds__(kBlock) quantize_rows(const Rows<T> p) {
  constexpr int kSize = Chunk<T>::kSize;
  constexpr bool kKeep = LOADS > 0;
  float* slots = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x % THREADS;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kBlock / THREADS) + threadIdx.x / THREADS;
  let_next_start();  // it fetches weights, and waits for this launch before it reads the codes
  if (row >= p.m) return;  // a whole warp, and never where the block meets
  const T* x = p.x + row * p.k;
  const auto begin_of = [&](int64_t i) { return (i * THREADS + thread) * kSize; };
  const int64_t loads = kKeep ? LOADS : ceil_div<int64_t>(p.k, THREADS * kSize);
  Chunk<T> kept[kKeep ? LOADS : 1];
  if constexpr (kKeep) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) kept[i] = load_chunk<true>(x, begin_of(i), p.k);
  }

  float factor = 0.0f;
  if constexpr (NORM) {
    float squares = 0.0f;
#pragma unroll
    for (int64_t i = 0; i < loads; ++i) {
      const Chunk<T> chunk = kKeep ? kept[kKeep ? i : 0] : load_chunk<false>(x, begin_of(i), p.k);
#pragma unroll
      for (int j = 0; j < kSize; ++j) squares = add(squares, mul(chunk[j], chunk[j]));
    }
    squares = reduce_threads<THREADS>(squares, Sum(), slots);
    factor = reciprocal(square_root(add(divide(squares, static_cast<float>(p.k)), p.norm_eps)));
    if constexpr (kKeep) {
#pragma unroll
      for (int i = 0; i < LOADS; ++i) kept[i] = normalize(p, kept[i], begin_of(i), factor);
    }
  }
  const auto chunk_at = [&](int64_t i) {
    if constexpr (kKeep) {
      return kept[i];
    } else {
      const Chunk<T> chunk = load_chunk<false>(x, begin_of(i), p.k);
      return NORM ? normalize(p, chunk, begin_of(i), factor) : chunk;
    }
  };

  float absmax = 0.0f;
  if (p.phase == Phase::given) {
    absmax = bits_to_float(*p.absmax);
  } else {
#pragma unroll
    for (int64_t i = 0; i < loads; ++i) absmax = absmax_with(absmax, chunk_at(i));
    absmax = reduce_threads<THREADS>(absmax, MaxNan(), slots + kBlock / kWarp);
  }
  if (p.phase == Phase::measure) {
    if (thread == 0)
      atomic_max(p.absmax, float_to_bits(absmax));  // of floats >= 0, and NaN above all, bits order as numbers do
    return;
  }

  const float divisor = divisor_of(absmax, p.eps);
  if (thread == 0 && p.divisor) p.divisor[row] = divisor;
  if (thread == 0 && p.scale) p.scale[row] = reciprocal(divisor);
  int8_t* codes = p.codes + row * p.stride;
  if constexpr (!kKeep) {
    for (int64_t i = thread; i < loads * THREADS; i += THREADS) {
      const Chunk<T> chunk = chunk_at(i / THREADS);
      for (int j = 0; j < kSize && i * kSize + j < p.k; ++j) store_one(p, codes, i * kSize + j, chunk[j], divisor);
    }
  } else if (p.order == Order::nibbles) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (begin_of(i) < p.k) store_nibbles(codes, begin_of(i), kept[i], divisor);
  } else if (p.order == Order::fields) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (begin_of(i) < p.k) store_fields(codes, begin_of(i), kept[i], divisor);
  } else {
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (begin_of(i) < p.k) store_natural(codes, begin_of(i), kept[i], divisor);
  }
  if (p.order != Order::natural) store_padding(p, row, thread, THREADS);
}

template <class T, int THREADS, int LOADS, bool NORM>
int run(const Rows<T>& p, cudaStream_t stream) {
  const dim3 grid = {static_cast<unsigned>(ceil_div<int64_t>(p.m, kBlock / THREADS))};
  return launch(quantize_rows<T, THREADS, LOADS, NORM>, grid, kBlock, 2 * kBlock / kWarp * sizeof(float), stream, p);
}

template <class T>
int choose(const Rows<T>& p, cudaStream_t stream) {
  const int64_t chunks = ceil_div<int64_t>(p.k, Chunk<T>::kSize);
  if (p.norm_weight) {
    if (!p.wide || chunks > 4 * kBlock) return run<T, kBlock, 0, true>(p, stream);
    return chunks <= 8 * kWarp ? run<T, kWarp, 8, true>(p, stream) : run<T, kBlock, 4, true>(p, stream);
  }
  if (!p.wide || chunks > 8 * kBlock) return run<T, kBlock, 0, false>(p, stream);
  if (chunks <= 4 * kWarp) return run<T, kWarp, 4, false>(p, stream);
  if (chunks <= 8 * kWarp) return run<T, kWarp, 8, false>(p, stream);
  if (chunks <= 12 * kWarp) return run<T, kWarp, 12, false>(p, stream);
  return chunks <= 4 * kBlock ? run<T, kBlock, 4, false>(p, stream) : run<T, kBlock, 8, false>(p, stream);
}

// The word that the rows' maxima meet in, cleared by a launch: a memset is no kernel, and graphs take both alike.
struct Clear {
  uint32_t* word;
};
__global__ void clear(const Clear p) {
  if (threadIdx.x == 0) *p.word = 0;
}

template <class T>
int quantize(const QuantizeActivation& a, Order order, int64_t groups, cudaStream_t stream) {
  const bool natural = order == Order::natural;
  Rows<T> p = {};
  p.x = static_cast<const T*>(a.x);
  p.norm_weight = static_cast<const T*>(a.norm_weight);
  p.codes = a.codes;
  p.divisor = a.divisor;
  p.scale = a.scale;
  p.m = a.m;
  p.k = a.k;
  p.groups = groups;
  p.length = a.k / groups;
  p.stride = natural ? a.k : padded_width(a.k, groups);
  p.eps = a.eps;
  p.norm_eps = a.norm_eps;
  p.order = order;
  p.wide = wide_rows(a.x, a.k, sizeof(T)) && aligned(a.codes, 8) && (natural || groups == 1 || p.length % 64 == 0);
  p.phase = Phase::token;
  if (!a.per_tensor) return choose(p, stream);
  p.absmax = static_cast<uint32_t*>(a.workspace);
  if (const int error = launch(clear, {1}, kWarp, 0, stream, Clear{p.absmax})) return error;
  p.phase = Phase::measure;
  if (const int error = choose(p, stream)) return error;
  p.phase = Phase::given;
  return choose(p, stream);
}

int quantize_any(const QuantizeActivation& p, Order order, int64_t groups, cudaStream_t stream) {
  if (p.m == 0 || p.k == 0) return 0;
  if (p.m < 0 || p.k < 0 || p.k > kMaxWidth || groups < 1 || p.k % groups || (p.per_tensor && !p.workspace))
    return kInvalidValue;
  switch (p.dtype) {
    case Dtype::f32: return quantize<float>(p, order, groups, stream);
    case Dtype::bf16: return quantize<Bf16>(p, order, groups, stream);
    case Dtype::f16: return quantize<F16>(p, order, groups, stream);
  }
  return kInvalidValue;
}

}  // namespace

int quantize_activation(const QuantizeActivation& p, cudaStream_t stream) {
  return quantize_any(p, Order::natural, 1, stream);
}

int quantize_interleaved(const PackedLinear& p, Order order, cudaStream_t stream) {
  QuantizeActivation q = {};
  q.x = p.x;
  q.dtype = p.out.dtype;
  q.m = p.m;
  q.k = p.k;
  q.per_tensor = p.per_tensor;
  q.eps = p.eps;
  q.codes = p.codes;
  q.divisor = p.divisor;
  q.workspace = p.workspace;
  return quantize_any(q, order, p.groups, stream);
}

}  // namespace qat::cuda
