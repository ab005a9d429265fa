// Codes times their scales in floats, for the products of the backward pass: int8 codes of activations, 2-bit bytes of weights.
//
// Floor: 1 or 1/4 byte read and 2 or 4 written an element, each once. A thread makes the 16 bytes of a store, four times, so that a
// warp's stores lie side by side and what all of them need is made once; their codes are loads of 1 to 8 bytes. Not measured: no
// GPU was there when this was written.
#include "codes.h"
#include "internal.h"

namespace qat::cuda {
namespace {

constexpr int kThreads = 256, kTurns = 4;

struct Floats {
  const uint8_t* codes;
  int64_t k, length, row_bytes;  // length: of what shares a scale
  const float* scale;            // or null: 1
  int64_t scale_stride, groups;
  void* out;
  int64_t chunks, count;         // chunks of a row, and all
};

__device__ __forceinline__ float scale_of(const Floats& p, int64_t row, int64_t column) {
  if (!p.scale) return 1.0f;
  return p.scale[row * p.scale_stride + (p.groups > 1 ? column / p.length : 0)];
}

// Byte i of four int8 codes as a float: 2^23 + 128 + code has the code plus 128 in its low byte.
__device__ __forceinline__ float code_to_float(uint32_t flipped, int i) {
  return add(bits_to_float(byte_permute(flipped, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i))), -8388736.0f);
}

// A chunk of 16 bytes [row, column..] of T; all its codes share a scale, and they are loaded at once.
template <class T, bool BITS>
__device__ __forceinline__ Chunk<T> wide_chunk(const Floats& p, int64_t row, int64_t column, float scale) {
  constexpr int kSize = Chunk<T>::kSize;
  Chunk<T> out;
  const uint8_t* from = p.codes + row * p.row_bytes + (BITS ? column / 4 : column);
  if constexpr (BITS) {
    const uint32_t codes = kSize == 8 ? *reinterpret_cast<const uint16_t*>(from) : *from;
    T value[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) from_float(mul(static_cast<float>(c - 1), scale), value[c]);
    if constexpr (kSize == 8) {  // 2 bytes each: two codes are a selector of bytes of all values
      uint32_t words[4];
      const uint32_t low = value[0].bits | static_cast<uint32_t>(value[1].bits) << 16, high = value[2].bits * 0x10001u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t two = codes >> 4 * i & 15u, apart = (two | two << 6) & 0x0303u;
        words[i] = byte_permute(low, high, apart * 0x22u + 0x1010u);
      }
      memcpy(&out, words, 16);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const uint32_t code = codes >> 2 * i & 3u;
        out.v[i] = code == 0 ? value[0] : code == 1 ? value[1] : value[2];
      }
    }
  } else {
    uint32_t words[kSize / 4];
    memcpy(words, __builtin_assume_aligned(from, kSize), kSize);
#pragma unroll
    for (int i = 0; i < kSize; ++i) from_float(mul(code_to_float(words[i / 4] ^ 0x80808080u, i % 4), scale), out.v[i]);
  }
  return out;
}

// WIDE: a chunk's codes share a scale, and all is aligned; else a thread makes one element at a time.
template <class T, bool BITS, bool WIDE>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Floats p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kTurns) + threadIdx.x;
  // Where no row has a scale of its own, there are no rows to find.
  const bool flat = WIDE && p.scale_stride == 0 && p.groups == 1;
  float scale = flat ? scale_of(p, 0, 0) : 0.0f;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int64_t i = first + turn * kThreads;
    if (i >= p.count) return;
    const int64_t row = flat ? 0 : i / p.chunks, column = (i - row * p.chunks) * (WIDE ? Chunk<T>::kSize : 1);
    if (!flat) scale = scale_of(p, row, column);
    if constexpr (WIDE) {
      const Chunk<T> out = wide_chunk<T, BITS>(p, row, column, scale);
      uint4 bytes;
      memcpy(&bytes, &out, 16);
      reinterpret_cast<uint4*>(p.out)[i] = bytes;
    } else {
      const uint8_t* from = p.codes + row * p.row_bytes;
      const int code = BITS ? static_cast<int>(from[column / 4] >> 2 * (column % 4) & 3) - 1 : static_cast<int8_t>(from[column]);
      from_float(mul(static_cast<float>(code), scale), static_cast<T*>(p.out)[row * p.k + column]);
    }
  }
}

template <class T, bool BITS>
int run(Floats p, int64_t n, cudaStream_t stream) {
  constexpr int kSize = Chunk<T>::kSize;
  const bool wide = p.length % kSize == 0 && aligned(p.out, 16) && aligned(p.codes, BITS ? kSize / 4 : kSize);
  p.chunks = wide ? p.k / kSize : p.k;
  p.count = n * p.chunks;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(p.count, kThreads * kTurns));
  return launch(wide ? dequantize_kernel<T, BITS, true> : dequantize_kernel<T, BITS, false>, {blocks}, kThreads, 0, stream, p);
}

template <bool BITS>
int run(const Floats& p, int64_t n, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::f32) return run<float, BITS>(p, n, stream);
  return dtype == Dtype::bf16 ? run<Bf16, BITS>(p, n, stream) : run<F16, BITS>(p, n, stream);
}

}  // namespace

int dequantize(const void* codes, bool bits, int64_t n, int64_t k, int64_t groups, const float* scale, int64_t scale_stride,
               Dtype dtype, void* out, cudaStream_t stream) {
  if (n == 0 || k == 0) return 0;
  if (n < 0 || k < 0 || groups < 1 || k % groups != 0) return kInvalidValue;
  const int64_t row_bytes = bits ? ceil_div<int64_t>(k, 4) : k;
  const Floats p = {static_cast<const uint8_t*>(codes), k, k / groups, row_bytes, scale, scale_stride, groups, out, 0, 0};
  return bits ? run<true>(p, n, dtype, stream) : run<false>(p, n, dtype, stream);
}

}  // namespace qat::cuda
