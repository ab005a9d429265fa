// Activations to int8, ternary codes to and from bits, and the rescaling of sums: the arithmetic that several kernels share.
#pragma once
#include "elements.h"

namespace qat::cuda {

// The largest of `most` and a chunk's magnitudes; a NaN stays.
template <class T>
__device__ __forceinline__ float absmax_with(float most, const Chunk<T>& chunk) {
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) most = max_nan(most, magnitude(chunk[i]));
  return most;
}

// 127 / max(absmax, eps) as torch computes it. A NaN stays one.
__device__ __forceinline__ float divisor_of(float absmax, float eps) {
  return mul(reciprocal(absmax < eps ? eps : absmax), 127.0f);
}

// rint(x * divisor) in the low byte: adding 1.5 * 2^23 rounds half to even, and |x * divisor| <= 127.00002 needs no clamp.
__device__ __forceinline__ uint32_t code_bits(float x, float divisor) {
  return float_to_bits(add(mul(x, divisor), 12582912.0f));
}

// All ones, or 0 for the divisor of a token that holds Inf (0) or NaN: torch's codes of it are 0.
__device__ __forceinline__ uint32_t code_mask(float divisor) { return divisor > 0.0f ? 0xffffffffu : 0u; }

// The low bytes of a, b, c, d in one word.
__device__ __forceinline__ uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return byte_permute(byte_permute(a, b, 0x0040), byte_permute(c, d, 0x0040), 0x5410);
}

// How activations lie beside 2-bit words, of every 64 elements j, whose codes are 4 words.
// nibbles: element e of word q is in byte (e >> 1 & 3) of 4 bytes number q of 16 bytes number (e & 1) * 2 + (e >> 3): a 2-bit word's
// even codes lie in separate nibbles, and so do its odd ones after a shift by 2, and a lane expands a whole word of its own for two
// products (`expand_word`).
// fields: word f of every 16 holds j = f, f + 4, f + 8 and f + 12, whose codes are field f of the four bytes of a 2-bit word
// (decode.cu).
enum class Order : int32_t { natural, nibbles, fields };

__device__ __forceinline__ int interleaved(int j, Order order) {
  const int q = j >> 4, e = j & 15;
  return order == Order::nibbles ? ((e & 1) * 2 + (e >> 3)) * 16 + q * 4 + (e >> 1 & 3) : q * 16 + (e & 3) * 4 + (e >> 2);
}

template <class T>
__device__ __forceinline__ void round_chunk(const Chunk<T>& chunk, float divisor, uint32_t (&codes)[Chunk<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) codes[i] = code_bits(chunk[i], divisor);
}

// Codes of elements [begin, begin + kSize) of a row, by 4 or 8 bytes.
template <class T>
__device__ __forceinline__ void store_natural(int8_t* row, int64_t begin, const Chunk<T>& chunk, float divisor) {
  uint32_t codes[Chunk<T>::kSize];
  round_chunk(chunk, divisor, codes);
  const uint32_t mask = code_mask(divisor), low = gather_bytes(codes[0], codes[1], codes[2], codes[3]) & mask;
  if constexpr (Chunk<T>::kSize == 8) {
    const uint32_t high = gather_bytes(codes[4], codes[5], codes[6], codes[7]) & mask;
    *reinterpret_cast<uint64_t*>(row + begin) = low | static_cast<uint64_t>(high) << 32;
  } else {
    *reinterpret_cast<uint32_t*>(row + begin) = low;
  }
}

// The same in the order of nibbles: groups are whole blocks of 64, or there is one.
template <class T>
__device__ __forceinline__ void store_nibbles(int8_t* row, int64_t begin, const Chunk<T>& chunk, float divisor) {
  uint32_t codes[Chunk<T>::kSize];
  round_chunk(chunk, divisor, codes);
  const uint32_t mask = code_mask(divisor);
  int8_t* block = row + begin / 64 * 64 + begin % 64 / 16 * 4 + begin % 16 / 8 * 16;
  if constexpr (Chunk<T>::kSize == 8) {
    *reinterpret_cast<uint32_t*>(block) = gather_bytes(codes[0], codes[2], codes[4], codes[6]) & mask;
    *reinterpret_cast<uint32_t*>(block + 32) = gather_bytes(codes[1], codes[3], codes[5], codes[7]) & mask;
  } else {
    block += begin % 8 / 4 * 2;
    *reinterpret_cast<uint16_t*>(block) = static_cast<uint16_t>(byte_permute(codes[0], codes[2], 0x0040) & mask);
    *reinterpret_cast<uint16_t*>(block + 32) = static_cast<uint16_t>(byte_permute(codes[1], codes[3], 0x0040) & mask);
  }
}

// The same in the order of fields.
template <class T>
__device__ __forceinline__ void store_fields(int8_t* row, int64_t begin, const Chunk<T>& chunk, float divisor) {
  uint32_t codes[Chunk<T>::kSize];
  round_chunk(chunk, divisor, codes);
  const uint32_t mask = code_mask(divisor);
  int8_t* block = row + begin / 16 * 16 + begin % 16 / 4;
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    if constexpr (Chunk<T>::kSize == 8) {
      const uint32_t pair = byte_permute(codes[f], codes[f + 4], 0x0040) & mask;
      *reinterpret_cast<uint16_t*>(block + f * 4) = static_cast<uint16_t>(pair);
    } else {
      block[f * 4] = static_cast<int8_t>(codes[f] & mask);
    }
  }
}

// Four codes t + 1, one in each of the low 16 bits' nibbles, to four int8 t: a table of 4 bytes looked up by prmt.
__device__ __forceinline__ uint32_t expand_nibbles(uint32_t codes) { return byte_permute(0x000100ffu, 0x000100ffu, codes); }

// 16 codes t + 1 as int8 t in the order of nibbles, 4 in each of `out`: 9 instructions.
__device__ __forceinline__ void expand_word(uint32_t word, uint32_t (&out)[4]) {
  const uint32_t even = word & 0x33333333u, odd = word >> 2 & 0x33333333u;
  out[0] = expand_nibbles(even);
  out[1] = expand_nibbles(even >> 16);
  out[2] = expand_nibbles(odd);
  out[3] = expand_nibbles(odd >> 16);
}

__device__ __forceinline__ float rescale(int32_t acc, float divisor, float inverse_scale) {
  return divide(static_cast<float>(acc), mul(divisor, inverse_scale));
}

// Factors of a divisor with which divide_plain is exact: no exponent comes near its ends.
__device__ __forceinline__ bool plain(float factor) { return factor > 0x1p-50f && factor < 0x1p50f; }

// a / b rounded once, for integers |a| < 2^26 and b the product of two plain factors: div.rn's own instructions, without its check
// of the exponents and the way that is taken where they are extreme.
__device__ __forceinline__ float divide_plain(float a, float b) {
  float r = reciprocal_near(b);
  r = fused(r, fused(-b, r, 1.0f), r);
  const float q = mul(a, r);
  return fused(r, fused(-b, q, a), q);
}

__device__ __forceinline__ float accumulate(float y, int32_t acc, float scale) {
  return add(y, mul(static_cast<float>(acc), scale));
}

}  // namespace qat::cuda
