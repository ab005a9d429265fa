// Codes of the nearest of a row's levels (qat/quantizers/components.py), in any number of planes. Included after soft.h, whose
// vectors it takes. No level is looked up: along the ascending levels a plane's code changes at each border by some step, so a
// code is the first level's and the steps of all borders below the weight.
#pragma once
#include "soft.h"

namespace qat {
namespace {

typedef int32_t Steps __attribute__((vector_size(QAT_VECTOR)));
typedef int8_t Codes __attribute__((vector_size(QAT_VECTOR / 4)));

template <int PLANES>
QAT_TARGET inline void nearest_vector(Floats x, const Book& book, Codes (&out)[PLANES]) {
  Steps code[PLANES];
#pragma GCC unroll 4
  for (int p = 0; p < PLANES; ++p) code[p] = Steps{} + book.codes[p];
  const int8_t* next = book.codes + PLANES;
  for (int64_t b = 0; b < book.borders; ++b, next += PLANES) {
    const Steps above = x > book.border[b];
#pragma GCC unroll 4
    for (int p = 0; p < PLANES; ++p) code[p] += above & (next[p] - next[p - PLANES]);
  }
#pragma GCC unroll 4
  for (int p = 0; p < PLANES; ++p) out[p] = __builtin_convertvector(code[p], Codes);
}

template <int PLANES>
QAT_TARGET void nearest_planes(const float* w, int64_t n, const Book& book, int8_t* const* out) {
  int64_t i = 0;
  Floats x = {};
  Codes code[PLANES];
  for (; i + kWide <= n; i += kWide) {
    std::memcpy(&x, w + i, sizeof x);
    nearest_vector<PLANES>(x, book, code);
#pragma GCC unroll 4
    for (int p = 0; p < PLANES; ++p) std::memcpy(out[p] + i, &code[p], sizeof code[p]);
  }
  if (i == n) return;
  const auto rest = static_cast<size_t>(n - i);
  x = Floats{};
  std::memcpy(&x, w + i, rest * sizeof(float));
  nearest_vector<PLANES>(x, book, code);
  for (int p = 0; p < PLANES; ++p) std::memcpy(out[p] + i, &code[p], rest);
}

QAT_TARGET void nearest(const float* w, int64_t n, const Book& book, int8_t* const* out) {
  switch (book.planes) {
    case 1: return nearest_planes<1>(w, n, book, out);
    case 2: return nearest_planes<2>(w, n, book, out);
    case 3: return nearest_planes<3>(w, n, book, out);
    default: return nearest_planes<4>(w, n, book, out);
  }
}

constexpr Isa with_nearest(Isa isa) {
  isa.nearest = nearest;
  return isa;
}

}  // namespace
}  // namespace qat
