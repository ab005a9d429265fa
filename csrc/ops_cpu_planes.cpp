// A float matrix as two planes of int8 codes, w ~ coarse high + fine low by rows, and what becomes of the planes' products
// (qat/ops/soft/planes.py): each a single pass where torch takes five or six. And gradients in bfloat16, with and without the
// scales of their tokens, from one read.
#include <optional>
#include <tuple>

#include "ops_cpu.h"

namespace qat::binding {
namespace {

// Codes int8 [K] of a row and their scale; a row of zeros has scale 1e-30 / 127.
float plane_of(const float* row, const Segments& s, int8_t* words, int8_t* codes) {
  const float most = isa().absmax(row, s.length), inverse = 1.0f / (most > 1e-30f || most != most ? most : 1e-30f) * 127.0f;
  int32_t sum;
  quantize_row(isa(), row, s, inverse, words, &sum, codes);
  return 1.0f / inverse;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_planes(const Tensor& weight) {
  const int64_t n = weight.size(0), k = weight.size(1);
  check_width(k, 1);
  const float* w = floats(weight, n * k, "weight");
  const auto segments = Segments::of(k, 1, false);
  Tensor high = empty({n, k}, ScalarType::Char), low = empty({n, k}, ScalarType::Char);
  Tensor coarse = empty({n, 1}, ScalarType::Float), fine = empty({n, 1}, ScalarType::Float);
  auto *high_codes = static_cast<int8_t*>(high.mutable_data_ptr()), *low_codes = static_cast<int8_t*>(low.mutable_data_ptr());
  auto *high_scale = static_cast<float*>(coarse.mutable_data_ptr()), *low_scale = static_cast<float*>(fine.mutable_data_ptr());
  share(torch_threads(), n, grain(2 * k), [&](int64_t begin, int64_t end) {
    const Scratch<int8_t> words(segments.row());
    const Scratch<float> rest(k);
    for (int64_t i = begin; i < end; ++i) {
      high_scale[i] = plane_of(w + i * k, segments, words.get(), high_codes + i * k);
      isa().dequantize(high_codes + i * k, k, high_scale[i], rest.get());
      isa().subtract(w + i * k, k, rest.get());
      low_scale[i] = plane_of(rest.get(), segments, words.get(), low_codes + i * k);
    }
  });
  return {high, coarse, low, fine};
}

// y [M, N] = (high * coarse + low * fine) * scale + bias for sums int32 [M, N], coarse, fine and bias by column, scale by row.
Tensor cpu_join_planes(const Tensor& high, const Tensor& low, const Tensor& coarse, const Tensor& fine, const Tensor& scale,
                       const std::optional<Tensor>& bias) {
  const int64_t m = high.size(0), n = high.size(1);
  for (const Tensor* sums : {&high, &low})
    STD_TORCH_CHECK(sums->scalar_type() == ScalarType::Int && sums->is_contiguous() && sums->numel() == m * n,
                    "sums must be contiguous int32 [M, N]");
  const auto *a = static_cast<const int32_t*>(high.const_data_ptr()), *b = static_cast<const int32_t*>(low.const_data_ptr());
  const float *by_a = floats(coarse, n, "coarse"), *by_b = floats(fine, n, "fine"), *by_row = floats(scale, m, "scale");
  const float* added = bias ? floats(*bias, n, "bias") : nullptr;
  Tensor y = empty({m, n}, ScalarType::Float);
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, m, grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) isa().join(a + i * n, b + i * n, n, by_a, by_b, by_row[i], added, out + i * n);
  });
  return y;
}

// grad and grad * scale [M, N] in bfloat16, scale by row.
std::tuple<Tensor, Tensor> cpu_scaled_bf16(const Tensor& grad, const Tensor& scale) {
  constexpr int64_t kSlice = 1024;
  const int64_t m = grad.size(0), n = grad.size(1);
  const float *in = floats(grad, m * n, "grad"), *by_row = floats(scale, m, "scale");
  Tensor plain = empty({m, n}, ScalarType::BFloat16), scaled = empty({m, n}, ScalarType::BFloat16);
  auto *to = static_cast<uint16_t*>(plain.mutable_data_ptr()), *to_scaled = static_cast<uint16_t*>(scaled.mutable_data_ptr());
  torch::stable::parallel_for(0, m, grain(n), [&](int64_t begin, int64_t end) {
    float values[kSlice];
    for (int64_t i = begin; i < end; ++i)
      for (int64_t first = 0; first < n; first += kSlice) {
        const int64_t at = i * n + first, count = n - first < kSlice ? n - first : kSlice;
        isa().from_float(in + at, count, Dtype::bf16, to + at);
        isa().scale(in + at, count, by_row[i], values);
        isa().from_float(values, count, Dtype::bf16, to_scaled + at);
      }
  });
  return {plain, scaled};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cpu_planes(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_join_planes(Tensor high, Tensor low, Tensor coarse, Tensor fine, Tensor scale, Tensor? bias) -> Tensor");
  m.def("cpu_scaled_bf16(Tensor grad, Tensor scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_planes", TORCH_BOX(&cpu_planes));
  m.impl("cpu_join_planes", TORCH_BOX(&cpu_join_planes));
  m.impl("cpu_scaled_bf16", TORCH_BOX(&cpu_scaled_bf16));
}

}  // namespace qat::binding
