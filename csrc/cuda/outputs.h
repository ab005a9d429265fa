// What becomes of a matmul's sums: rescaled, rounded and written, 8 neighbouring outputs of a token at a time.
//
// They come from shared memory, so that a thread has neighbours, and y is written by whole 32-byte sectors. A quotient is
// division's own instructions without its checks wherever no exponent comes near its ends (divide_plain), 11 instructions an
// element with the loads and the store; anything else is divided as it is.
#pragma once
#include <type_traits>

#include "codes.h"

namespace qat::cuda {

struct Target {
  Output out;
  const float* divisor;
  int64_t m, n;
  bool raw;   // y is int32 = sums
  bool wide;  // rows of y are aligned to 16 bytes
};

namespace {

constexpr int kUnit = 8;  // outputs that a thread writes at once

Target target_of(const Output& out, const float* divisor, int64_t m, int64_t n, bool raw) {
  Target t = {out, divisor, m, n, raw, false};
  if (raw) t.out.bias = nullptr;
  t.wide = aligned(out.y, 16) && n * (raw ? 4 : size_of(out.dtype)) % 16 == 0;
  return t;
}

// Of 8 outputs from `first` on. GROUPS: sums are rescaled already, but for the divisor, and are bits of floats.
template <bool GROUPS>
struct Factors {
  int64_t first;
  int count;  // that are there
  float inverse[kUnit], bias[kUnit];
  bool all_plain;

  __device__ __forceinline__ Factors(const Target& p, int64_t first_) : first(first_), all_plain(!GROUPS) {
    count = static_cast<int>(p.n - first < kUnit ? p.n - first : kUnit);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const bool there = i < count;
      if (!GROUPS) {
        const float scale = there && !p.raw ? p.out.scale[(first + i) * p.out.scale_stride] : 1.0f;
        all_plain = all_plain && plain(scale);
        inverse[i] = reciprocal(scale);
      }
      bias[i] = there && p.out.bias ? p.out.bias[first + i] : 0.0f;
    }
  }
};

// Rows of COLUMNS sums in shared memory, PAD bytes apart so that neither who writes nor who reads them meets a bank twice: 16 bytes
// number u of a row change places with their neighbour in every other 128 bytes, and in every other row.
template <int COLUMNS, int PAD>
struct SumRows {
  static constexpr int kPitch = COLUMNS * 4 + PAD, kUnits = COLUMNS / kUnit;

  __device__ static __forceinline__ int place(int row, int u) { return row * kPitch + ((u ^ ((u >> 3 ^ row) & 1)) * 16); }
  __device__ static __forceinline__ void take(const unsigned char* rows, int row, int unit, int32_t (&sums)[kUnit]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = load_shared<uint4>(rows + place(row, unit * 2 + half));
      memcpy(sums + half * 4, &four, 16);
    }
  }
};

// y of a token and the factors' outputs in T; int32_t is raw. `before`: rows of y ahead of token 0.
template <class T, bool GROUPS>
__device__ __forceinline__ void write_unit(const Target& p, const Factors<GROUPS>& f, int64_t token,
                                           const int32_t (&sums)[kUnit], int64_t before = 0) {
  alignas(16) T y[kUnit];
  if constexpr (std::is_same_v<T, int32_t>) {
    memcpy(y, sums, sizeof(y));
  } else {
    const float divisor = p.divisor[token];
    float v[kUnit];
    if (f.all_plain && plain(divisor)) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = divide_plain(static_cast<float>(sums[i]), mul(divisor, f.inverse[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i)
        v[i] = GROUPS ? divide(bits_to_float(static_cast<uint32_t>(sums[i])), divisor) : rescale(sums[i], divisor, f.inverse[i]);
    }
    if (p.out.bias) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = add(v[i], f.bias[i]);
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) from_float(v[i], y[i]);
  }
  T* to = static_cast<T*>(p.out.y) + (token + before) * p.n + f.first;
  if (p.wide && f.count == kUnit) {
#pragma unroll
    for (int i = 0; i < kUnit; i += 16 / static_cast<int>(sizeof(T))) {
      uint4 words;
      memcpy(&words, y + i, 16);
      *reinterpret_cast<uint4*>(to + i) = words;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      if (i < f.count) to[i] = y[i];
  }
}

// Rows of sums, those of tokens from token0 on: of them every `step`-th from `first` on is this thread's.
template <class T, class Rows, bool GROUPS>
__device__ __forceinline__ void write_rows_as(const Target& p, const Factors<GROUPS>& f, const unsigned char* rows, int unit,
                                              int first, int step, int count, int64_t token0, int64_t before = 0) {
  if (f.count <= 0) return;
#pragma unroll 1
  for (int row = first; row < count; row += step) {
    if (token0 + row >= p.m) break;
    int32_t sums[kUnit];
    Rows::take(rows, row, unit, sums);
    write_unit<T>(p, f, token0 + row, sums, before);
  }
}

template <class Rows, bool GROUPS>
__device__ __forceinline__ void write_rows(const Target& p, const Factors<GROUPS>& f, const unsigned char* rows, int unit,
                                           int first, int step, int count, int64_t token0) {
  if (p.raw) {  // sums of a part of K lie behind those of the parts ahead
    const int64_t before = int64_t{blockIdx.y} * p.m;
    return write_rows_as<int32_t, Rows>(p, f, rows, unit, first, step, count, token0, before);
  }
  switch (p.out.dtype) {
    case Dtype::f32: return write_rows_as<float, Rows>(p, f, rows, unit, first, step, count, token0);
    case Dtype::bf16: return write_rows_as<Bf16, Rows>(p, f, rows, unit, first, step, count, token0);
    case Dtype::f16: return write_rows_as<F16, Rows>(p, f, rows, unit, first, step, count, token0);
  }
}

}  // namespace
}  // namespace qat::cuda
