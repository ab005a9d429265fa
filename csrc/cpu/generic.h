// The kernels in plain C++, once for each instruction set: the including file defines QAT_TARGET, its attributes.
// Every function is static, so that no copy compiled for a newer CPU can be linked into an older path.
#pragma once
#include <cstring>

#include "kernels.h"

namespace qat {
namespace {

QAT_TARGET inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

QAT_TARGET inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

QAT_TARGET inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return bits_to_float(sign | ((rest << 13) + 0x38000000u));
  const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24: a subnormal half
  return bits_to_float(sign | float_to_bits(magnitude));
}

QAT_TARGET inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (rest < 0x38800000u) {  // a subnormal half: the sum below leaves it, rounded, in the low bits
    const float shifted = bits_to_float(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13));
}

QAT_TARGET inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

QAT_TARGET void to_float(const void* x, Dtype dtype, int64_t n, float* out) {
  const auto* in = static_cast<const uint16_t*>(x);
  if (dtype == Dtype::f32) {
    std::memcpy(out, x, static_cast<size_t>(n) * 4);
  } else if (dtype == Dtype::bf16) {
    for (int64_t i = 0; i < n; ++i) out[i] = bits_to_float(static_cast<uint32_t>(in[i]) << 16);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
  }
}

QAT_TARGET void from_float(const float* x, int64_t n, Dtype dtype, void* y) {
  auto* out = static_cast<uint16_t*>(y);
  if (dtype == Dtype::f32) {
    std::memcpy(y, x, static_cast<size_t>(n) * 4);
  } else if (dtype == Dtype::bf16) {
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_half(x[i]);
  }
}

// The bits of |x| order as integers do, with NaN above all: the maximum keeps a NaN, as torch's amax does.
QAT_TARGET float absmax(const float* x, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<int32_t>(float_to_bits(x[i]) & 0x7fffffffu);
    most = bits > most ? bits : most;
  }
  return bits_to_float(static_cast<uint32_t>(most));
}

// Round half to even by adding 1.5 * 2^23; |value| is at most a little above 127 here. A NaN gives some code.
QAT_TARGET inline int32_t round_code(float value) {
  const auto code = static_cast<int32_t>(float_to_bits(value + 12582912.0f) - 0x4b400000u);
  return code < -128 ? -128 : code > 127 ? 127 : code;
}

QAT_TARGET inline int64_t word_position(int64_t i) { return (i & ~int64_t{15}) + (i & 3) * 4 + (i >> 2 & 3); }

// Elements [from, length) of one group; returns their sum.
QAT_TARGET inline int32_t quantize_rest(const float* x, int64_t from, int64_t length, float inverse, int8_t* words,
                                        int8_t* codes) {
  int32_t sum = 0;
  for (int64_t i = from; i < length; ++i) {
    const int32_t code = round_code(x[i] * inverse);
    sum += code;
    words[word_position(i)] = static_cast<int8_t>(code);
    if (codes) codes[i] = static_cast<int8_t>(code);
  }
  return sum;
}

QAT_TARGET void quantize(const float* x, const Segments& s, float inverse, int8_t* words, int32_t* sums, int8_t* codes) {
  for (int64_t g = 0; g < s.count; ++g, x += s.length, words += s.padded, codes += codes ? s.length : 0) {
    std::memset(words, 0, static_cast<size_t>(s.padded));
    sums[g] = quantize_rest(x, 0, s.length, inverse, words, codes);
  }
}

QAT_TARGET void rescale(const int32_t* acc, int32_t sum, const float* divisor, float* y) {
  for (int64_t i = 0; i < kPanel; ++i) y[i] = static_cast<float>(acc[i] - sum) / divisor[i];
}

QAT_TARGET void accumulate(const int32_t* acc, int32_t sum, const float* scale, float* y) {
  for (int64_t i = 0; i < kPanel; ++i) y[i] += static_cast<float>(acc[i] - sum) * scale[i];
}

// |w / scale| > 0.5 is what round half to even and the clip leave of the code's magnitude.
QAT_TARGET void ternary(const float* w, int64_t n, float scale, int8_t* t) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = w[i] / scale;
    t[i] = static_cast<int8_t>((value > 0.5f) - (value < -0.5f));
  }
}

QAT_TARGET void binary(const float* w, int64_t n, float threshold, int8_t* t) {
  for (int64_t i = 0; i < n; ++i) t[i] = static_cast<int8_t>(w[i] > threshold ? 1 : -1);
}

QAT_TARGET void dequantize(const int8_t* codes, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(codes[i]) * scale;
}

constexpr int kSums = 32;  // partial sums in double: enough additions under way on every path, and one order for all

template <class Term>
QAT_TARGET inline double total(const float* x, int64_t n, const Term& term) {
  double lanes[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int lane = 0; lane < kSums; ++lane) lanes[lane] += term(x[i + lane]);
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += term(x[i]);
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

struct Value {
  QAT_TARGET double operator()(float x) const { return static_cast<double>(x); }
};
struct Magnitude {
  QAT_TARGET double operator()(float x) const { return static_cast<double>(bits_to_float(float_to_bits(x) & 0x7fffffffu)); }
};
struct Square {  // exact in double, so that a fused multiply-add gives the same
  QAT_TARGET double operator()(float x) const { return static_cast<double>(x) * static_cast<double>(x); }
};

QAT_TARGET double sum(const float* x, int64_t n) { return total(x, n, Value()); }
QAT_TARGET double magnitudes(const float* x, int64_t n) { return total(x, n, Magnitude()); }
QAT_TARGET double squares(const float* x, int64_t n) { return total(x, n, Square()); }

// e^x to a relative 2e-7, without a branch, so that the compiler vectorizes it: 2^n e^r with |r| <= ln(2) / 2.
QAT_TARGET inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  const float p =
      1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333338e-3f + r * 1.3888889e-3f)))));
  return p * bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
}

constexpr int kLanes = 16;  // partial sums of a reduction, so that it vectorizes without reassociation

QAT_TARGET inline float value_of(float x) { return x; }

QAT_TARGET inline float value_of(uint16_t bfloat) { return bits_to_float(static_cast<uint32_t>(bfloat) << 16); }

template <class T>
QAT_TARGET inline float product(const float* a, const T* b, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * value_of(b[i + lane]);
  for (; i < n; ++i) lanes[0] += a[i] * value_of(b[i]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

QAT_TARGET void rows(const float* x, const void* rows, Dtype dtype, int64_t n, int64_t k, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = dtype == Dtype::f32 ? product(x, static_cast<const float*>(rows) + i * k, k)
                               : product(x, static_cast<const uint16_t*>(rows) + i * k, k);
  }
}

QAT_TARGET void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  const float factor = 1.0f / __builtin_sqrtf(product(x, x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * factor);
}

QAT_TARGET void gate(float* y, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = y[i] / (1.0f + exponential(-y[i])) * up[i];
}

QAT_TARGET void rotate(float* x, const float* cos, const float* sin, int64_t n) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[half + i] + a * sin[half + i];
  }
}

QAT_TARGET inline void add_scaled(float* __restrict y, const float* __restrict x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

QAT_TARGET void attend(const float* q, const float* keys, const float* values, int64_t length, int64_t width, float scale,
                       float* weights, float* y) {
  float most = -__builtin_inff(), sum = 0.0f;
  for (int64_t t = 0; t < length; ++t) {
    weights[t] = product(q, keys + t * width, width) * scale;
    most = weights[t] > most ? weights[t] : most;
  }
  for (int64_t t = 0; t < length; ++t) weights[t] = exponential(weights[t] - most);
  for (int64_t t = 0; t < length; ++t) sum += weights[t];
  std::memset(y, 0, static_cast<size_t>(width) * sizeof(float));
  for (int64_t t = 0; t < length; ++t) add_scaled(y, values + t * width, weights[t], width);
  for (int64_t i = 0; i < width; ++i) y[i] /= sum;
}

QAT_TARGET uint64_t read(const uint64_t* words, int64_t n) {
  uint64_t sum[4][8] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int j = 0; j < 4; ++j) __builtin_prefetch(words + i + 1024 + 8 * j);  // as the kernels do; no limit otherwise
    for (int j = 0; j < 4; ++j)
      for (int lane = 0; lane < 8; ++lane) sum[j][lane] += words[i + 8 * j + lane];
  }
  for (; i < n; ++i) sum[0][0] += words[i];
  for (int j = 0; j < 4; ++j)
    for (int lane = j ? 0 : 1; lane < 8; ++lane) sum[0][0] += sum[j][lane];
  return sum[0][0];
}

// A path of the functions above and its own `dot`; what else it has of its own, it puts in their place.
constexpr Isa path(const char* name, int tokens, decltype(Isa::dot) dot) {
  Isa isa = {};
  isa.name = name;
  isa.tokens = tokens;
  isa.to_float = to_float;
  isa.from_float = from_float;
  isa.absmax = absmax;
  isa.quantize = quantize;
  isa.dot = dot;
  isa.rescale = rescale;
  isa.accumulate = accumulate;
  isa.ternary = ternary;
  isa.binary = binary;
  isa.sum = sum;
  isa.magnitudes = magnitudes;
  isa.squares = squares;
  isa.dequantize = dequantize;
  isa.rms_norm = rms_norm;
  isa.gate = gate;
  isa.rotate = rotate;
  isa.attend = attend;
  isa.rows = rows;
  isa.read = read;
  return isa;
}

}  // namespace
}  // namespace qat
