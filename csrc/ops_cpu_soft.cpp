// Soft codes as torch ops: what a row's levels and borders are to the kernels, rows cut into slices, and the dtype written.
#include <cmath>
#include <tuple>

#include "ops_cpu.h"

namespace qat::binding {
namespace {

constexpr int64_t kSlice = 1024;  // weights at once: their results in float32 stay in the nearest cache

// One row's levels [m] and borders [m - 1] for the kernels; levels that are equal have nothing between them.
Soft soft_of(const float* levels, const float* borders, int64_t m, float beta, Border* out) {
  for (int64_t i = 0; i + 1 < m; ++i) {
    const float apart = levels[i + 1] - levels[i];
    const bool there = apart > 0.0f;
    out[i] = {borders[i], there ? beta / apart : 0.0f, apart / 2.0f, there ? beta : 0.0f};
  }
  return {(levels[0] + levels[m - 1]) / 2.0f, m - 1, out};
}

bool is_ternary(const float* levels, const float* borders, int64_t m, float beta) {
  return m == 3 && levels[1] == 0.0f && levels[2] > 0.0f && levels[0] == -levels[2] && borders[1] == -borders[0] &&
         borders[1] == levels[2] / 2.0f && beta <= Soft::kMostSharp;
}

void soften_slice(const float* w, int64_t n, const Soft& p, bool ternary, Dtype dtype, char* soft, char* slope) {
  const auto kernel = ternary ? isa().soften_ternary : isa().soften;
  if (dtype == Dtype::f32) return kernel(w, n, p, reinterpret_cast<float*>(soft), reinterpret_cast<float*>(slope));
  float values[kSlice], slopes[kSlice];
  kernel(w, n, p, values, slopes);
  isa().from_float(values, n, dtype, soft);
  isa().from_float(slopes, n, dtype, slope);
}

}  // namespace

// (soft weights, slopes) [R, L] of float32 rows [R, L] with levels [R, m] in ascending order and borders [R, m - 1].
std::tuple<Tensor, Tensor> cpu_soften(const Tensor& rows, const Tensor& levels, const Tensor& borders, double sharpness,
                                      int64_t kind) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const int64_t r = rows.size(0), length = rows.size(1), m = levels.size(1), slices = (length + kSlice - 1) / kSlice;
  STD_TORCH_CHECK(m >= 2 && kind >= 0 && kind < 3, "wrong levels or kind");
  const float *in = floats(rows, r * length, "rows"), *level = floats(levels, r * m, "levels"),
              *border = floats(borders, r * (m - 1), "borders");
  const auto beta = static_cast<float>(sharpness);
  Tensor soft = empty({r, length}, kTypes[kind]), slope = empty({r, length}, kTypes[kind]);
  const Dtype dtype = dtype_of(soft);
  const int64_t size = dtype == Dtype::f32 ? 4 : 2;
  auto *to = static_cast<char*>(soft.mutable_data_ptr()), *slopes = static_cast<char*>(slope.mutable_data_ptr());
  torch::stable::parallel_for(0, r * slices, grain((length < kSlice ? length : kSlice) * m), [&](int64_t begin, int64_t end) {
    std::vector<Border> steps(static_cast<size_t>(m - 1));
    Soft p = {};
    for (int64_t i = begin, last = -1; i < end; ++i) {
      const int64_t row = i / slices, first = i % slices * kSlice, count = length - first < kSlice ? length - first : kSlice;
      if (row != last) p = soft_of(level + row * m, border + row * (m - 1), m, beta, steps.data());
      last = row;
      const bool ternary = is_ternary(level + row * m, border + row * (m - 1), m, beta);
      const int64_t at = row * length + first;
      soften_slice(in + at, count, p, ternary, dtype, to + at * size, slopes + at * size);
    }
  });
  return {soft, slope};
}

namespace {

// Codes int8 [N, planes K], planes side by side, of rows float32 [R, L] that are a weight [N, K]: those of the nearest levels,
// which borders [R, B] part and book int8 [R, B + 1, planes] holds in ascending order. A weight on a border takes the level below.
Tensor cpu_nearest(const Tensor& rows, const Tensor& borders, const Tensor& book, int64_t k) {
  const int64_t length = rows.size(1), n = rows.numel() / k, r = rows.size(0), count = borders.size(1), planes = book.size(2);
  const float *in = floats(rows, n * k, "rows"), *border = floats(borders, r * count, "borders");
  STD_TORCH_CHECK(book.scalar_type() == ScalarType::Char && book.is_contiguous() && book.numel() == r * (count + 1) * planes &&
                      planes >= 1 && planes <= Book::kMostPlanes && n * k == r * length && (length % k == 0 || k % length == 0),
                  "wrong book, borders or rows");
  const auto* codes = static_cast<const int8_t*>(book.const_data_ptr());
  Tensor t = empty({n, planes * k}, ScalarType::Char);
  auto* to = static_cast<int8_t*>(t.mutable_data_ptr());
  const int64_t piece = length < k ? length : k, pieces = k / piece;
  torch::stable::parallel_for(0, n * pieces, grain(piece * count), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces, first = i % pieces * piece, at = i * piece / length;
      int8_t* out[Book::kMostPlanes];
      for (int64_t p = 0; p < planes; ++p) out[p] = to + (row * planes + p) * k + first;
      isa().nearest(in + i * piece, piece,
                    {count, static_cast<int>(planes), border + at * count, codes + at * (count + 1) * planes}, out);
    }
  });
  return t;
}

}  // namespace

// (what the codes of x [M, K] stand for, in its dtype; the codes; their scales [M, 1]), each token its own scale: a token is
// measured, rounded and written back while it is in the cache.
std::tuple<Tensor, Tensor, Tensor> cpu_rounded(const Tensor& x, double least) {
  const int64_t m = x.size(0), k = x.size(1), size = x.element_size();
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  check_width(k, 1);
  const Dtype dtype = dtype_of(x);
  const auto segments = Segments::of(k, 1, false);
  Tensor values = empty({m, k}, x.scalar_type()), codes = empty({m, k}, ScalarType::Char), scale = empty({m, 1}, ScalarType::Float);
  const auto* in = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(values.mutable_data_ptr());
  auto* code = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  share(torch_threads(), m, grain(k), [&](int64_t begin, int64_t end) {
    const Scratch<int8_t> words(segments.row());
    const Scratch<float> floats(dtype == Dtype::f32 ? 0 : k);
    for (int64_t row = begin; row < end; ++row) {
      const float* token = reinterpret_cast<const float*>(in + row * k * size);
      if (dtype != Dtype::f32) isa().to_float(token, dtype, k, floats.get());
      if (dtype != Dtype::f32) token = floats.get();
      const float most = isa().absmax(token, k), limit = static_cast<float>(least);
      const float inverse = 1.0f / (most > limit || most != most ? most : limit) * 127.0f;  // as quantize_tokens has it
      int32_t sum;
      quantize_row(isa(), token, segments, inverse, words.get(), &sum, code + row * k);
      scales[row] = 1.0f / inverse;
      float* target = dtype == Dtype::f32 ? reinterpret_cast<float*>(to) + row * k : floats.get();
      isa().dequantize(code + row * k, k, scales[row], target);
      if (dtype != Dtype::f32) isa().from_float(target, k, dtype, to + row * k * size);
    }
  });
  return {values, codes, scale};
}

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cpu_soften(Tensor rows, Tensor levels, Tensor borders, float beta, int kind) -> (Tensor, Tensor)");
  m.def("cpu_nearest(Tensor rows, Tensor borders, Tensor book, int in_features) -> Tensor");
  m.def("cpu_rounded(Tensor x, float eps) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_soften", TORCH_BOX(&cpu_soften));
  m.impl("cpu_nearest", TORCH_BOX(&cpu_nearest));
  m.impl("cpu_rounded", TORCH_BOX(&cpu_rounded));
}

}  // namespace qat::binding
