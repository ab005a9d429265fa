// Weight quantization: scale and codes of a latent weight, as int8 and as 2-bit bytes.
//
// Floor for fp32 [13824, 2560]: 141.6 MB in, 8.8 MB packed or 35.4 MB int8 out: 35 us with one read, 68 us with two.
// Design: one scale a channel or group: read once, a row (or group) held in the registers of 8, 32 or 256 threads between
// sum and rounding. One scale a tensor must read twice, as 141 MB fit into no on-chip memory: the first pass leaves up to 528
// partial sums, which every block of the second adds up in the same order (no third launch, no atomics); the second pass
// runs backwards, so that it meets what the first left in the L2 cache (up to 50 of the 141 MB). All loads are 16 bytes,
// four or more under way a thread: 1024 threads an SM x 64 bytes = 64 KB in flight, more than the 40 KB needed.
// No division: rint(w / scale) is not 0 exactly where |2 w| > scale (w / scale rounds to 0.5, and then to 0, only if equal).
// Every weight is added in double, so that the mean, rounded once, is that of any other order and device. Adding a thread's 16
// bytes in float first was one double addition for 4 or 8 weights, but gave another scale now and then. Data-centre GPUs have
// doubles to spare (H100: 64 an SM and clock, against 20 weights that memory brings); consumer ones (sm_86, sm_89, sm_120)
// convert and add 2 an SM and clock, about as many float weights as their memory brings.
#include "internal.h"
#include "weight_codes.h"

namespace qat::cuda {
namespace {

constexpr int kPartials = 528;  // most blocks of the first pass: 4 an SM of a large GPU
constexpr int kLoads = 4;       // of a thread before the first use, in both passes over a tensor

static_assert(kPartials * sizeof(Moments) <= kWorkspaceBytes);

// One scale for each row of [R, L]: THREADS take a row, each LOADS chunks; LOADS = 0 is any length and alignment, read twice.
template <class T, int THREADS, int LOADS>
__global__ void __launch_bounds__(kBlock) quantize_shared_rows(const Weight<T> p) {
  constexpr int kSize = Chunk<T>::kSize, kKept = LOADS > 0 ? LOADS : 1;
  double* slots = reinterpret_cast<double*>(shared_memory());
  const int thread = threadIdx.x % THREADS;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kBlock / THREADS) + threadIdx.x / THREADS;
  const bool active = row < p.rows;  // part of a warp may be idle, and shuffles along
  const int64_t length = active ? p.length : 0;
  const T* w = p.w + (active ? row : 0) * p.length;
  const auto begin_of = [&](int64_t i) { return (i * THREADS + thread) * kSize; };
  const int64_t loads = LOADS > 0 ? LOADS : ceil_div<int64_t>(p.length, THREADS * kSize);

  Chunk<T> kept[kKept];
  if constexpr (LOADS > 0) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) kept[i] = load_chunk<true>(w, begin_of(i), length);
  }
  Moments m = {0.0, 0.0};
#pragma unroll
  for (int64_t i = 0; i < loads; ++i) gather(p, LOADS > 0 ? kept[i % kKept] : load_chunk<false>(w, begin_of(i), length), m);
  m = combine<THREADS>(m, p.absmax, p.binary, slots);
  if (!active) return;

  const Limit limit = limit_of(p, m, row);
  if (thread == 0 && !p.given) p.scale[row] = limit.scale;
  const int64_t packed_row = row / p.groups * p.row_bytes + row % p.groups * p.length / 4;
#pragma unroll
  for (int64_t i = 0; i < loads; ++i) {
    if (begin_of(i) < length)
      store(p, LOADS > 0 ? kept[i % kKept] : load_chunk<false>(w, begin_of(i), length), limit, row * p.length, packed_row,
            begin_of(i), length);
  }
}

// One scale for all. First pass: partial sums over the flat tensor.
template <class T, bool WIDE>
__global__ void __launch_bounds__(kBlock) measure(const Weight<T> p) {
  double* slots = reinterpret_cast<double*>(shared_memory());
  const int64_t size = p.rows * p.length, chunks = ceil_div<int64_t>(size, Chunk<T>::kSize);
  Moments m = {0.0, 0.0};
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kBlock * kLoads; base < chunks;
       base += static_cast<int64_t>(gridDim.x) * kBlock * kLoads) {
    Chunk<T> kept[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      kept[i] = load_chunk<WIDE>(p.w, (base + i * kBlock + static_cast<int>(threadIdx.x)) * Chunk<T>::kSize, size);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) gather(p, kept[i], m);
  }
  m = combine<kBlock>(m, p.absmax, p.binary, slots);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = m;
}

// Second pass, from the end: codes. FLAT: rows hold whole chunks, so the matrix is one long row.
template <class T, bool FLAT>
__global__ void __launch_bounds__(kBlock) quantize_all(const Weight<T> p) {
  constexpr int kSize = Chunk<T>::kSize;
  double* slots = reinterpret_cast<double*>(shared_memory());
  const int64_t row_chunks = ceil_div<int64_t>(p.length, kSize), chunks = p.rows * row_chunks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock * kLoads;
  Limit limit = {0.0f, 0.0f};
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kBlock * kLoads; base < chunks; base += step) {
    const auto index_of = [&](int i) { return chunks - 1 - (base + i * kBlock + static_cast<int>(threadIdx.x)); };
    const auto row_of = [&](int i) { return FLAT || index_of(i) < 0 ? 0 : index_of(i) / row_chunks; };
    const auto begin_of = [&](int i) { return (index_of(i) - row_of(i) * row_chunks) * kSize; };
    Chunk<T> kept[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool valid = index_of(i) >= 0;
      kept[i] = load_chunk<FLAT>(p.w + row_of(i) * p.length, valid ? begin_of(i) : 0, valid ? p.length : 0);
    }
    if (base < step) {  // while the first loads are under way
      Moments m = {0.0, 0.0};
      for (int i = static_cast<int>(threadIdx.x); i < p.partial_count; i += kBlock) {
        m.magnitude = p.absmax ? Larger()(m.magnitude, p.partials[i].magnitude) : m.magnitude + p.partials[i].magnitude;
        m.sum += p.partials[i].sum;
      }
      limit = limit_of(p, combine<kBlock>(m, p.absmax, p.binary, slots), 0);
      if (base == 0 && threadIdx.x == 0 && !p.given) *p.scale = limit.scale;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (index_of(i) >= 0) store(p, kept[i], limit, row_of(i) * p.length, row_of(i) * p.row_bytes, begin_of(i), p.length);
    }
  }
}

constexpr std::size_t kSlots = 2 * kBlock / kWarp * sizeof(double);

template <class T, int THREADS, int LOADS>
int run_rows(const Weight<T>& p, cudaStream_t stream) {
  const dim3 grid = {static_cast<unsigned>(ceil_div<int64_t>(p.rows, kBlock / THREADS))};
  return launch(quantize_shared_rows<T, THREADS, LOADS>, grid, kBlock, kSlots, stream, p);
}

template <class T>
int quantize_by_rows(const Weight<T>& p, cudaStream_t stream) {
  const int64_t chunks = ceil_div<int64_t>(p.length, Chunk<T>::kSize);
  if (!p.wide) return run_rows<T, kBlock, 0>(p, stream);
  if (chunks <= 2 * 8) return run_rows<T, 8, 2>(p, stream);
  if (chunks <= 4 * 8) return run_rows<T, 8, 4>(p, stream);
  if (chunks <= 4 * kWarp) return run_rows<T, kWarp, 4>(p, stream);
  if (chunks <= 12 * kWarp) return run_rows<T, kWarp, 12>(p, stream);
  if (chunks <= 4 * kBlock) return run_rows<T, kBlock, 4>(p, stream);
  if (chunks <= 12 * kBlock) return run_rows<T, kBlock, 12>(p, stream);
  return run_rows<T, kBlock, 0>(p, stream);
}

template <class T>
int quantize_tensor(const Weight<T>& rows, const QuantizeWeight& q, cudaStream_t stream) {
  Weight<T> p = rows;
  p.count = static_cast<double>(q.n) * static_cast<double>(q.k);
  if (!p.given || p.binary) {
    const int64_t wanted = ceil_div<int64_t>(q.n * q.k, Chunk<T>::kSize * kBlock * kLoads);
    p.partials = static_cast<Moments*>(q.workspace);
    p.partial_count = static_cast<int>(wanted < kPartials ? wanted : kPartials);
    const auto kernel = wide_rows(q.w, q.n * q.k, sizeof(T)) ? measure<T, true> : measure<T, false>;
    if (const int error = launch(kernel, {static_cast<unsigned>(p.partial_count)}, kBlock, kSlots, stream, p)) return error;
  }
  const bool flat = p.wide;
  if (flat) {
    p.length *= p.rows;
    p.rows = 1;
  }
  const int64_t chunks = p.rows * ceil_div<int64_t>(p.length, Chunk<T>::kSize);
  const int64_t blocks = ceil_div<int64_t>(chunks, kBlock * kLoads);
  const dim3 grid = {static_cast<unsigned>(blocks < 2 * kPartials ? blocks : 2 * kPartials)};
  return launch(flat ? quantize_all<T, true> : quantize_all<T, false>, grid, kBlock, kSlots, stream, p);
}

template <class T>
int quantize(const QuantizeWeight& q, cudaStream_t stream) {
  Weight<T> p = {};
  const bool shared_rows = q.granularity != Granularity::tensor;
  const bool straddles = q.packed && q.groups > 1 && (q.k / q.groups) % 4 != 0;  // bytes shared by two groups
  p.w = static_cast<const T*>(q.w);
  p.groups = shared_rows ? q.groups : 1;
  p.rows = q.n * p.groups;
  p.length = q.k / p.groups;
  p.row_bytes = ceil_div<int64_t>(q.k, 4);
  p.absmax = q.reduce == Reduce::absmax;
  p.given = q.reduce == Reduce::given;
  p.binary = q.binary;
  p.scale_dtype = q.scale_dtype;
  p.eps = q.eps;
  p.t = q.t;
  p.packed = straddles ? nullptr : q.packed;
  p.scale = q.scale;
  p.count = static_cast<double>(p.length);
  p.wide = wide_rows(q.w, p.length, sizeof(T));
  p.wide_t = aligned(q.t, 4) && p.length % 4 == 0;
  if (straddles && !q.t) return kInvalidValue;
  if (!shared_rows) return quantize_tensor(p, q, stream);
  if (const int error = quantize_by_rows(p, stream)) return error;
  return straddles ? pack(q.t, q.n, q.k, Layout::bits, q.packed, nullptr, stream) : 0;
}

}  // namespace

int quantize_weight(const QuantizeWeight& q, cudaStream_t stream) {
  if (q.n == 0 || q.k == 0) return 0;
  const bool group = q.granularity == Granularity::group;
  if (q.n < 0 || q.k < 0 || q.k > kMaxWidth || q.groups < 1 || q.k % q.groups || (!group && q.groups != 1) || !q.scale ||
      (q.granularity == Granularity::tensor && !q.workspace))
    return kInvalidValue;
  switch (q.dtype) {
    case Dtype::f32: return quantize<float>(q, stream);
    case Dtype::bf16: return quantize<Bf16>(q, stream);
    case Dtype::f16: return quantize<F16>(q, stream);
  }
  return kInvalidValue;
}

}  // namespace qat::cuda
