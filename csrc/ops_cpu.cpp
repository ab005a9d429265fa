// The linears and what they are made of as torch ops. This checks shapes, allocates, splits the work among torch's threads
// and calls the kernels. These ops are below autograd and are not for users: qat/ops/cpu.py calls them, caches the tiles,
// and says what a user did wrong.
#include <optional>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops_cpu.h"

namespace qat::binding {
namespace {

// Tiles are read front to back at every call: huge pages save a tenth to a fifth of that where memory is the limit.
void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // Advice: a kernel without them is no error.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace

Tensor make_tiles(const Tensor& rows, Source source, int64_t k, int64_t groups, bool base3) {
  check_width(k, groups);
  const int64_t n = rows.size(0), row_bytes = rows.size(1);
  const int64_t per_byte = source == Source::bits ? 4 : source == Source::base3 ? 5 : 1;
  STD_TORCH_CHECK(
      rows.dim() == 2 && rows.is_contiguous() && rows.element_size() == 1 && row_bytes == (k + per_byte - 1) / per_byte,
      "wrong rows for tiles");
  const auto segments = Segments::of(k, groups, base3);
  Tensor tiles = empty({tile_words(n, segments, base3)}, ScalarType::Int);
  ask_for_huge_pages(tiles.mutable_data_ptr(), tiles.numel() * 4);
  const Tiling plan = {
      source, rows.const_data_ptr(), row_bytes, n, segments, base3, static_cast<uint32_t*>(tiles.mutable_data_ptr())};
  const int64_t panels = (n + kPanel - 1) / kPanel;
  torch::stable::parallel_for(0, panels, grain(k * kPanel),
                              [&](int64_t begin, int64_t end) { make_tiles(plan, begin, end); });
  return tiles;
}

namespace {

Tensor cpu_tile(const Tensor& packed, int64_t k, int64_t groups, bool packed_base3, bool base3) {
  return make_tiles(packed, packed_base3 ? Source::base3 : Source::bits, k, groups, base3);
}

Tensor cpu_tile_codes(const Tensor& t, int64_t groups) { return make_tiles(t, Source::codes, t.size(1), groups, false); }

// Quantizes all tokens of p into its scratch.
void quantize(Linear& p, bool per_tensor) {
  const int64_t step = grain(p.k);
  if (per_tensor) {
    torch::stable::parallel_for(0, p.m, step, [&](int64_t begin, int64_t end) { measure_tokens(p, begin, end); });
    p.absmax = 0.0f;
    for (int64_t row = 0; row < p.m; ++row)
      if (p.absmax == p.absmax && !(p.divisor[row] <= p.absmax)) p.absmax = p.divisor[row];  // takes a NaN, and keeps it
  }
  share(torch_threads(), p.m, step, [&](int64_t begin, int64_t end) { quantize_tokens(p, begin, end); });
}

}  // namespace

Result run(const Tensor& x_any, const Tensor& tiles, const Tensor& scale, const std::optional<Tensor>& bias, int64_t n,
           int64_t k, int64_t groups, bool base3, bool per_tensor, double eps, bool keep) {
  Linear p = with_weights(tiles, scale, bias ? &*bias : nullptr, n, k, groups, base3, eps);
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 1 && sizes[sizes.size() - 1] == k, "x must be [..., ", k, "]");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  p.m = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) p.m *= shape[i];

  Result result;
  if (keep) {
    result.x_q = empty(shape, ScalarType::Char);
    shape.back() = 1;
    result.x_scale = empty(shape, ScalarType::Float);
  }
  shape.back() = n;
  result.y = empty(shape, x.scalar_type());
  const Scratch<int8_t> words(p.m * p.segments.row());
  const Scratch<int32_t> sums(p.m * groups);
  const Scratch<float> divisor(p.m);

  p.x = x.const_data_ptr();
  p.y = result.y.mutable_data_ptr();
  p.dtype = dtype_of(x);
  p.words = words.get();
  p.sums = sums.get();
  p.divisor = divisor.get();
  p.x_scale = keep ? static_cast<float*>(result.x_scale.mutable_data_ptr()) : nullptr;
  p.codes = keep ? static_cast<int8_t*>(result.x_q.mutable_data_ptr()) : nullptr;
  if (p.m == 0) return result;
  quantize(p, per_tensor);
  if (n > 0) multiply(p, torch_threads());
  return result;
}

namespace {

Tensor cpu_linear(const Tensor& x, const Tensor& tiles, const Tensor& scale, const std::optional<Tensor>& bias, int64_t n,
                  int64_t k, int64_t groups, bool base3, bool per_tensor, double eps) {
  return run(x, tiles, scale, bias, n, k, groups, base3, per_tensor, eps, false).y;
}

std::tuple<Tensor, Tensor, Tensor> cpu_bitlinear(const Tensor& x, const Tensor& tiles, const Tensor& scale,
                                                 const std::optional<Tensor>& bias, int64_t n, int64_t k, int64_t groups,
                                                 bool per_tensor, double eps) {
  Result result = run(x, tiles, scale, bias, n, k, groups, false, per_tensor, eps, true);
  return {result.y, result.x_q, result.x_scale};
}

std::tuple<Tensor, Tensor> cpu_quantize_activation(const Tensor& x, bool per_tensor, double eps) {
  const int64_t k = x.size(x.dim() - 1);
  const Tensor none = empty({0}, ScalarType::Int), one = torch::stable::full({1}, 1.0, ScalarType::Float);
  Result result = run(x, none, one, std::nullopt, 0, k, 1, false, per_tensor, eps, true);
  return {result.x_q, result.x_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cpu_tile(Tensor packed, int k, int groups, bool packed_base3, bool base3) -> Tensor");
  m.def("cpu_tile_codes(Tensor t, int groups) -> Tensor");
  m.def(
      "cpu_linear(Tensor x, Tensor tiles, Tensor scale, Tensor? bias, int n, int k, int groups, bool base3, bool per_tensor,"
      " float eps) -> Tensor");
  m.def(
      "cpu_bitlinear(Tensor x, Tensor tiles, Tensor scale, Tensor? bias, int n, int k, int groups, bool per_tensor, float eps)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("cpu_quantize_activation(Tensor x, bool per_tensor, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_tile", TORCH_BOX(&cpu_tile));
  m.impl("cpu_tile_codes", TORCH_BOX(&cpu_tile_codes));
  m.impl("cpu_linear", TORCH_BOX(&cpu_linear));
  m.impl("cpu_bitlinear", TORCH_BOX(&cpu_bitlinear));
  m.impl("cpu_quantize_activation", TORCH_BOX(&cpu_quantize_activation));
}

}  // namespace qat::binding
