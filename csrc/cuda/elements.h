// float32, bfloat16 and float16 in memory, 16 bytes at a time.
#pragma once
#include "ptx.h"

namespace qat::cuda {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(F16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ void from_float(float value, float& out) { out = value; }
__device__ __forceinline__ void from_float(float value, Bf16& out) { out.bits = float_to_bfloat(value); }
__device__ __forceinline__ void from_float(float value, F16& out) { out.bits = float_to_half(value); }

__device__ __forceinline__ float magnitude(float x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }

template <class T>
__device__ __forceinline__ float rounded(float value) {
  T out;
  from_float(value, out);
  return to_float(out);
}

// Elements that one load brings.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];

  __device__ __forceinline__ float operator[](int i) const { return to_float(v[i]); }
};

// Elements [begin, begin + kSize) of a row, zeros from `end` on. WIDE: the row is 16-byte aligned and holds whole chunks.
// FRESH: see load_fresh; for wide rows only.
template <bool WIDE, bool FRESH = false, class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, int64_t begin, int64_t end) {
  Chunk<T> out;
  if constexpr (WIDE) {
    uint4 bytes = {0, 0, 0, 0};
    if (begin < end) bytes = FRESH ? load_fresh(row + begin) : load_streaming(row + begin);
    memcpy(&out, &bytes, 16);
  } else {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i) {
      if (begin + i < end) {
        out.v[i] = row[begin + i];
      } else {
        from_float(0.0f, out.v[i]);
      }
    }
  }
  return out;
}

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether rows of k elements can be read by whole chunks.
inline bool wide_rows(const void* pointer, int64_t k, int64_t element_size) {
  return aligned(pointer, 16) && k * element_size % 16 == 0;
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// y[i] in a dtype known at run time.
__device__ __forceinline__ void store_element(void* y, Dtype dtype, int64_t i, float value) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(y)[i] = value;
  } else {
    static_cast<uint16_t*>(y)[i] = dtype == Dtype::bf16 ? float_to_bfloat(value) : float_to_half(value);
  }
}

}  // namespace qat::cuda
