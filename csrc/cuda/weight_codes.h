// What weights.cu gathers of weights, the scale and limits that follow, and the codes: one 16-byte chunk at a time.
#pragma once
#include "codes.h"
#include "reduce.h"

namespace qat::cuda {
namespace {

struct Moments {
  double magnitude;  // sum or maximum of |w|
  double sum;        // of w, for binary codes
};

template <class T>
struct Weight {
  const T* w;
  int64_t rows, length;       // rows that share a scale, or in the streaming passes rows of any length
  int64_t groups, row_bytes;  // of the packed matrix
  bool absmax, given, binary;
  Dtype scale_dtype;
  float eps;
  int8_t* t;
  uint8_t* packed;
  float* scale;
  Moments* partials;
  int partial_count;  // 0 where nothing was measured
  double count;       // weights that share a scale
  bool wide, wide_t;
};

struct Larger {  // keeps a NaN
  __device__ double operator()(double a, double b) const { return a != a || a > b ? a : b; }
};

template <class T>
__device__ __forceinline__ void gather(const Weight<T>& p, const Chunk<T>& chunk, Moments& m) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) {
    if (p.absmax) {
      most = max_nan(most, magnitude(chunk[i]));
    } else {
      m.magnitude += static_cast<double>(magnitude(chunk[i]));
    }
    if (p.binary) m.sum += static_cast<double>(chunk[i]);
  }
  if (p.absmax) m.magnitude = Larger()(m.magnitude, static_cast<double>(most));
}

template <int THREADS>
__device__ __forceinline__ Moments combine(Moments m, bool absmax, bool binary, double* slots) {
  m.magnitude =
      absmax ? reduce_threads<THREADS>(m.magnitude, Larger(), slots) : reduce_threads<THREADS>(m.magnitude, Sum(), slots);
  if (binary) m.sum = reduce_threads<THREADS>(m.sum, Sum(), slots + kBlock / kWarp);
  return m;
}

// max(value, eps) rounded to the dtype that will store it, within its positive range.
__device__ __forceinline__ float scale_of(float value, float eps, Dtype dtype) {
  value = value < eps ? eps : value;
  const float least = dtype == Dtype::f16 ? 0x1p-24f : dtype == Dtype::bf16 ? 0x1p-133f : 0x1p-149f;
  const float most = dtype == Dtype::f16 ? 65504.0f : bits_to_float(dtype == Dtype::bf16 ? 0x7f7f0000u : 0x7f7fffffu);
  value = value < least ? least : value > most ? most : value;
  return dtype == Dtype::f16 ? rounded<F16>(value) : dtype == Dtype::bf16 ? rounded<Bf16>(value) : value;
}

// What a code depends on: ternary |2 w| > scale, binary w > mean.
struct Limit {
  float scale, mean;
};

template <class T>
__device__ __forceinline__ Limit limit_of(const Weight<T>& p, const Moments& m, int64_t row) {
  Limit limit;
  if (p.given) {
    limit.scale = p.scale[row];
  } else {
    limit.scale = scale_of(static_cast<float>(p.absmax ? m.magnitude : m.magnitude / p.count), p.eps, p.scale_dtype);
  }
  limit.mean = p.binary ? static_cast<float>(m.sum / p.count) : 0.0f;
  return limit;
}

__device__ __forceinline__ int code_of(float w, const Limit& limit, bool binary) {
  if (binary) return w > limit.mean ? 1 : -1;
  const float twice = add(w, w);
  return (twice > limit.scale) - (twice < -limit.scale);
}

// The codes of elements [begin, end) of a row that starts at element `t_row` of t and byte `packed_row` of packed.
template <class T>
__device__ __forceinline__ void store(const Weight<T>& p, const Chunk<T>& chunk, const Limit& limit, int64_t t_row,
                                      int64_t packed_row, int64_t begin, int64_t end) {
  constexpr int kSize = Chunk<T>::kSize;
  int code[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) code[i] = begin + i < end ? code_of(chunk[i], limit, p.binary) : 0;
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    if (begin + i >= end) break;
    int8_t* t = p.t + t_row + begin + i;
    if (p.t && p.wide_t) {
      *reinterpret_cast<uint32_t*>(t) = gather_bytes(static_cast<uint32_t>(code[i]), static_cast<uint32_t>(code[i + 1]),
                                                     static_cast<uint32_t>(code[i + 2]), static_cast<uint32_t>(code[i + 3]));
    } else if (p.t) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (begin + i + j < end) t[j] = static_cast<int8_t>(code[i + j]);
    }
    if (p.packed) {
      const int byte = code[i] + 1 + (code[i + 1] + 1) * 4 + (code[i + 2] + 1) * 16 + (code[i + 3] + 1) * 64;
      p.packed[packed_row + (begin + i) / 4] = static_cast<uint8_t>(byte);
    }
  }
}

}  // namespace
}  // namespace qat::cuda
