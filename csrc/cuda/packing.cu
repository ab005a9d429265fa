// int8 codes to and from bytes of 2-bit or base-3 codes, and base-3 bytes to 2-bit ones (qat/quantizers/packing.py has the layouts).
//
// Floor: 1.25 K (2bit) or 1.2 K (base3) bytes a row; done once when a model is loaded or saved, so plain code: a thread a
// byte, and four bytes from 16 codes at once where rows of 2bit allow it (16-byte loads, 4-byte stores a thread; the 256
// threads of a block then move 5 KB at a time). Not measured: no GPU was there when this was written.
#include "codes.h"
#include "internal.h"

namespace qat::cuda {
namespace {

constexpr int kThreads = 256;

struct Bytes {
  int8_t* t;
  uint8_t *packed, *bits;  // bits: the result of repack
  int64_t n, k;
  uint64_t* bad;
};

template <bool BASE3>
struct Form {
  static constexpr int kPerByte = BASE3 ? 5 : 4, kBase = BASE3 ? 3 : 4;
  __device__ static bool valid(uint32_t byte) { return BASE3 ? byte < 243 : (byte & byte >> 1 & 0x55) == 0; }
};

__device__ __forceinline__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

template <bool BASE3>
__global__ void __launch_bounds__(kThreads) pack_bytes(const Bytes p) {
  constexpr int kPerByte = Form<BASE3>::kPerByte, kBase = Form<BASE3>::kBase;
  const int64_t row_bytes = ceil_div<int64_t>(p.k, kPerByte), i = thread_index();
  if (i >= p.n * row_bytes) return;
  const int64_t row = i / row_bytes, first = (i - row * row_bytes) * kPerByte;
  uint32_t byte = 0, power = 1;
  for (int d = 0; d < kPerByte; ++d, power *= kBase) {
    const int code = first + d < p.k ? p.t[row * p.k + first + d] : 0;
    if (p.bad && (code < -1 || code > 1)) atomic_min(p.bad, static_cast<uint64_t>(row * p.k + first + d));
    byte += static_cast<uint32_t>(code + 1) * power;
  }
  p.packed[i] = static_cast<uint8_t>(byte);
}

// Bits 2i of byte b of a word of int8 codes 0..2 to one byte.
__device__ __forceinline__ uint32_t squeeze(uint32_t codes) { return (codes | codes >> 6 | codes >> 12 | codes >> 18) & 255u; }

// 16 codes: K is a multiple of 16, so that rows do not matter.
__global__ void __launch_bounds__(kThreads) pack_words(const Bytes p) {
  const int64_t i = thread_index();
  if (i >= p.n * p.k / 16) return;
  const uint4 t = load_streaming(p.t + i * 16);
  const uint32_t words[4] = {t.x, t.y, t.z, t.w};
  uint32_t out = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t codes = ((words[w] ^ 0x80808080u) + 0x01010101u) ^ 0x80808080u;  // + 1 in each byte; a code of 127 carries
    if (p.bad && (codes & 0xfcfcfcfcu || codes & codes >> 1 & 0x01010101u)) {
      for (int b = 0; b < 4; ++b) {
        const int code = static_cast<int8_t>(words[w] >> 8 * b & 255u);
        if (code < -1 || code > 1) atomic_min(p.bad, static_cast<uint64_t>(i * 16 + w * 4 + b));
      }
    }
    out |= squeeze(codes) << 8 * w;
  }
  reinterpret_cast<uint32_t*>(p.packed)[i] = out;
}

template <bool BASE3>
__global__ void __launch_bounds__(kThreads) unpack_bytes(const Bytes p) {
  constexpr int kPerByte = Form<BASE3>::kPerByte, kBase = Form<BASE3>::kBase;
  const int64_t row_bytes = ceil_div<int64_t>(p.k, kPerByte), i = thread_index();
  if (i >= p.n * row_bytes) return;
  const int64_t row = i / row_bytes, first = (i - row * row_bytes) * kPerByte;
  uint32_t byte = p.packed[i];
  if (p.bad && !Form<BASE3>::valid(byte)) atomic_min(p.bad, static_cast<uint64_t>(i));
  for (int d = 0; d < kPerByte && first + d < p.k; ++d, byte /= kBase)
    p.t[row * p.k + first + d] = static_cast<int8_t>(byte % kBase) - 1;
}

// One byte's four 2-bit codes to four bytes.
__device__ __forceinline__ uint32_t spread(uint32_t byte) { return (byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303u; }

__global__ void __launch_bounds__(kThreads) unpack_words(const Bytes p) {
  const int64_t i = thread_index();
  if (i >= p.n * p.k / 16) return;
  const uint32_t word = reinterpret_cast<const uint32_t*>(p.packed)[i];
  if (p.bad && (word & word >> 1 & 0x55555555u)) {
    for (int b = 0; b < 4; ++b)
      if (!Form<false>::valid(word >> 8 * b & 255u)) atomic_min(p.bad, static_cast<uint64_t>(i * 4 + b));
  }
  uint32_t t[4];
#pragma unroll
  for (int b = 0; b < 4; ++b)
    t[b] = ((spread(word >> 8 * b & 255u) | 0x80808080u) - 0x01010101u) ^ 0x80808080u;  // - 1 in each byte
  *reinterpret_cast<uint4*>(p.t + i * 16) = {t[0], t[1], t[2], t[3]};
}

__global__ void __launch_bounds__(kThreads) repack_bytes(const Bytes p) {
  const int64_t row_bytes = ceil_div<int64_t>(p.k, 4), base3_bytes = ceil_div<int64_t>(p.k, 5), i = thread_index();
  if (i >= p.n * row_bytes) return;
  const int64_t row = i / row_bytes, first = (i - row * row_bytes) * 4;
  uint32_t out = 0;
  for (int d = 0; d < 4; ++d) {
    uint32_t code = 1;
    if (first + d < p.k) {
      const int64_t at = row * base3_bytes + (first + d) / 5;
      uint32_t byte = p.packed[at];
      if (p.bad && !Form<true>::valid(byte)) atomic_min(p.bad, static_cast<uint64_t>(at));
      for (int digit = static_cast<int>((first + d) % 5); digit > 0; --digit) byte /= 3;
      code = byte % 3;
    }
    out |= code << 2 * d;
  }
  p.bits[i] = static_cast<uint8_t>(out);
}

int run(void (*kernel)(Bytes), int64_t threads, const Bytes& p, cudaStream_t stream) {
  return launch(kernel, {static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads))}, kThreads, 0, stream, p);
}

bool empty(int64_t n, int64_t k) { return n == 0 || k == 0; }
bool wrong(int64_t n, int64_t k) { return n < 0 || k < 0 || k > kMaxWidth; }
bool by_words(const void* t, const void* packed, int64_t k) { return k % 16 == 0 && aligned(t, 16) && aligned(packed, 4); }

}  // namespace

int pack(const int8_t* t, int64_t n, int64_t k, Layout layout, uint8_t* packed, uint64_t* bad, cudaStream_t stream) {
  if (wrong(n, k)) return kInvalidValue;
  if (empty(n, k)) return 0;
  const Bytes p = {const_cast<int8_t*>(t), packed, nullptr, n, k, bad};
  if (layout == Layout::base3) return run(pack_bytes<true>, n * ceil_div<int64_t>(k, 5), p, stream);
  return by_words(t, packed, k) ? run(pack_words, n * k / 16, p, stream)
                                : run(pack_bytes<false>, n * ceil_div<int64_t>(k, 4), p, stream);
}

int unpack(const uint8_t* packed, int64_t n, int64_t k, Layout layout, int8_t* t, uint64_t* bad, cudaStream_t stream) {
  if (wrong(n, k)) return kInvalidValue;
  if (empty(n, k)) return 0;
  const Bytes p = {t, const_cast<uint8_t*>(packed), nullptr, n, k, bad};
  if (layout == Layout::base3) return run(unpack_bytes<true>, n * ceil_div<int64_t>(k, 5), p, stream);
  return by_words(t, packed, k) ? run(unpack_words, n * k / 16, p, stream)
                                : run(unpack_bytes<false>, n * ceil_div<int64_t>(k, 4), p, stream);
}

int repack(const uint8_t* base3, int64_t n, int64_t k, uint8_t* bits, uint64_t* bad, cudaStream_t stream) {
  if (wrong(n, k)) return kInvalidValue;
  if (empty(n, k)) return 0;
  const Bytes p = {nullptr, const_cast<uint8_t*>(base3), bits, n, k, bad};
  return run(repack_bytes, n * ceil_div<int64_t>(k, 4), p, stream);
}

}  // namespace qat::cuda
