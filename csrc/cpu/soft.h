// Soft codes (qat/quantizers/soft.py): the mean of a weight's code under logistic thresholds, and its slope. Included after
// generic.h, once for each instruction set, whose vectors have QAT_VECTOR bytes. No path fuses a product with a sum, so all
// give the same bits. The compiler's own vectors: it vectorizes a loop with these selections for AVX512 only, and is 15 times
// slower without.
//
// A border b between two levels D apart adds D sigma(z) with z = beta (w - b) / D to the weight and beta sigma'(z) to the slope.
// With e = e^-|z| <= 1 that is one exponential and one quotient a border: sigma' = e / (1 + e)^2, tanh(|z| / 2) = (1 - e) / (1 + e).
#pragma once
#include "generic.h"

namespace qat {
namespace {

typedef float Floats __attribute__((vector_size(QAT_VECTOR)));
typedef uint32_t Words __attribute__((vector_size(QAT_VECTOR)));
constexpr int64_t kWide = QAT_VECTOR / 4;
constexpr uint32_t kSign = 0x80000000u;

QAT_TARGET inline Floats every(float value) { return Floats{} + value; }

QAT_TARGET inline Floats size_of(Floats x) { return (Floats)((Words)x & ~kSign); }

QAT_TARGET inline Floats signed_as(Floats size, Floats x) { return (Floats)((Words)size | ((Words)x & kSign)); }

// e^-z to a relative 2e-7 for z >= -87, and 0 above 87, so that what is far from a border has no slope at all; NaN stays NaN.
// 2^n e^r with |r| <= ln(2) / 2: `exponential` of generic.h.
QAT_TARGET inline Floats decay(Floats z) {
  const Floats limit = every(87.0f), magic = every(12582912.0f), x = z > limit ? -limit : -z;
  const Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  const Floats p =
      1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333338e-3f + r * 1.3888889e-3f)))));
  return z > limit ? Floats{} : p * (Floats)(((Words)shifted - 0x4b400000u + 127u) << 23);
}

// soft[i] and slope[i] are what `one` makes of w[i]: by whole vectors, the last one filled with zeros.
template <class One>
QAT_TARGET inline void by_vectors(const float* w, int64_t n, float* soft, float* slope, const One& one) {
  int64_t i = 0;
  Floats x = {}, value, slopes;
  for (; i + kWide <= n; i += kWide) {
    std::memcpy(&x, w + i, sizeof x);
    one(x, value, slopes);
    std::memcpy(soft + i, &value, sizeof x);
    std::memcpy(slope + i, &slopes, sizeof x);
  }
  if (i == n) return;
  const auto rest = static_cast<size_t>(n - i) * sizeof(float);
  x = Floats{};
  std::memcpy(&x, w + i, rest);
  one(x, value, slopes);
  std::memcpy(soft + i, &value, rest);
  std::memcpy(slope + i, &slopes, rest);
}

struct AnyLevels {
  const Soft& p;

  QAT_TARGET void operator()(Floats x, Floats& sum, Floats& slopes) const {
    sum = every(p.middle);
    slopes = Floats{};
    for (int64_t i = 0; i < p.count; ++i) {
      const Border border = p.borders[i];
      const Floats z = (x - border.at) * border.factor, e = decay(size_of(z)), part = 1.0f / (1.0f + e);
      sum += signed_as((1.0f - e) * part * border.half, z);
      slopes += e * part * part * border.slope;
    }
  }
};

// Levels -s, 0, s and borders +-s / 2: both borders from one exponential. With c = e^-beta and g = e^(beta (1/2 - |w| / s)), so
// that the upper threshold has 1 / (1 + g) and the lower one 1 / (1 + c g):
//     |Q| / s = (1 - c g^2) / ((1 + g)(1 + c g))        dQ/dw = beta g ((1 + c g)^2 + c (1 + g)^2) / ((1 + g)(1 + c g))^2
// g is at most e^(beta / 2): nothing leaves float32's range below kMostSharp.
struct Ternary {
  const float border, factor, scale, beta;
  const Floats c;

  QAT_TARGET explicit Ternary(const Border& upper)
      : border(upper.at), factor(upper.factor), scale(2.0f * upper.half), beta(upper.slope), c(decay(every(upper.slope))) {}
  QAT_TARGET void operator()(Floats x, Floats& soft, Floats& slope) const {
    const Floats g = decay((size_of(x) - border) * factor), low = g * c;
    const Floats upper = 1.0f + g, lower = 1.0f + low, inverse = 1.0f / (upper * lower);
    soft = signed_as((1.0f - g * low) * inverse * scale, x);
    slope = beta * (g * inverse) * ((lower * lower + c * upper * upper) * inverse);
  }
};

QAT_TARGET void soften(const float* w, int64_t n, const Soft& p, float* soft, float* slope) {
  by_vectors(w, n, soft, slope, AnyLevels{p});
}

QAT_TARGET void soften_ternary(const float* w, int64_t n, const Soft& p, float* soft, float* slope) {
  by_vectors(w, n, soft, slope, Ternary(p.borders[1]));
}

QAT_TARGET void scale(const float* x, int64_t n, float factor, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
}

QAT_TARGET void subtract(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] - y[i];
}

QAT_TARGET void join(const int32_t* a, const int32_t* b, int64_t n, const float* by_a, const float* by_b, float factor,
                     const float* bias, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = (static_cast<float>(a[i]) * by_a[i] + static_cast<float>(b[i]) * by_b[i]) * factor;
  if (bias)
    for (int64_t i = 0; i < n; ++i) y[i] += bias[i];
}

constexpr Isa softened(Isa isa) {
  isa.scale = scale;
  isa.subtract = subtract;
  isa.join = join;
  isa.soften = soften;
  isa.soften_ternary = soften_ternary;
  return isa;
}

}  // namespace
}  // namespace qat
