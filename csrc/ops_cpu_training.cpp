// The training linear as one op each way, for small layers, whose time is that of calls: what qat/ops/cpu.py and
// qat/ops/gradients.py put together of the other ops, in their order and from the same kernels, so that every bit is theirs.
// qat/ops/fused says which layers come here.
#include <tuple>

#include "ops_cpu.h"
#include "ops_gradients.h"

namespace qat::binding {
namespace {

// How a weight [N, K] in r rows that share a scale each is quantized: `qat.quantizers.scales`, for a mean of magnitudes.
struct Quantizer {
  int64_t r, groups;
  bool binary;
  float multiplier, eps, least, most;  // the last two: of the dtype that scales are rounded to
  int64_t rounds_to;                   // float32 (0), bfloat16 (1) or float16 (2)

  // A NaN goes through, as it does in torch's clamp.
  float scale(float mean) const {
    float s = multiplier == 1.0f ? mean : mean * multiplier;
    s = s < eps ? eps : s;
    s = s < least ? least : s > most ? most : s;
    if (rounds_to == 1) return static_cast<float>(torch::headeronly::BFloat16(s));
    return rounds_to == 2 ? static_cast<float>(torch::headeronly::Half(s)) : s;
  }
};

struct Weight {
  Tensor codes, scale;  // int8 [N, K], float32 [1 | N, 1 | G]
};

Weight quantized(const Tensor& w, const Quantizer& q) {
  STD_TORCH_CHECK(w.dim() == 2 && w.is_contiguous() && w.scalar_type() == ScalarType::Float && w.numel() > 0 &&
                      w.numel() % q.r == 0 && q.r % q.groups == 0,
                  "w must be contiguous float32 [N, K], in ", q.r, " rows that share a scale");
  const int64_t length = w.numel() / q.r;
  Weight found = {empty({w.size(0), w.size(1)}, ScalarType::Char), empty({q.r / q.groups, q.groups}, ScalarType::Float)};
  auto* scale = static_cast<float*>(found.scale.mutable_data_ptr());
  take_means(w, q.r, length, true, scale);
  for (int64_t row = 0; row < q.r; ++row) scale[row] = q.scale(scale[row]);
  const Scratch<float> threshold(q.binary ? q.r : 0);
  if (q.binary) take_means(w, q.r, length, false, threshold.get());
  take_codes(static_cast<const float*>(w.const_data_ptr()), q.r, length, q.binary ? threshold.get() : scale, q.binary,
             static_cast<int8_t*>(found.codes.mutable_data_ptr()));
  return found;
}

// Scales [N, G] of several groups by panels [ceil(N / 64), G, 64], as the kernels read them; [1 | N, 1] as they are.
Tensor by_panels(const Tensor& scale, int64_t n, int64_t groups) {
  if (groups <= 1) return scale;
  Tensor out = empty({(n + kPanel - 1) / kPanel, groups, kPanel}, ScalarType::Float);
  const auto* in = static_cast<const float*>(scale.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < out.numel(); ++i) {
    const int64_t row = i / (groups * kPanel) * kPanel + i % kPanel, g = i / kPanel % groups;
    to[i] = row < n ? in[row * groups + g] : 0.0f;
  }
  return out;
}

// (y in `dtype`, to which x is cast first; and for the backward pass: codes of x and their scales, of w in 2 bits, and its scales)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_fused_linear(const Tensor& x_any, const Tensor& w,
                                                                    const std::optional<Tensor>& bias_any, ScalarType dtype,
                                                                    int64_t r, int64_t groups, bool binary, double multiplier,
                                                                    double least, double most, int64_t rounds_to,
                                                                    bool per_tensor, double eps) {
  const Tensor x = x_any.scalar_type() == dtype ? x_any : torch::stable::to(x_any, dtype);
  std::optional<Tensor> bias = bias_any;
  if (bias && bias->scalar_type() != ScalarType::Float) bias = torch::stable::to(*bias, ScalarType::Float);
  if (bias && !bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
  const auto f = [](double value) { return static_cast<float>(value); };
  const Weight weight = quantized(w, {r, groups, binary, f(multiplier), f(eps), f(least), f(most), rounds_to});
  const int64_t n = w.size(0), k = w.size(1);
  const Tensor tiles = make_tiles(weight.codes, Source::codes, k, groups, false);
  Result y = run(x, tiles, by_panels(weight.scale, n, groups), bias, n, k, groups, false, per_tensor, eps, true);
  return {y.y, y.x_q, y.x_scale, cpu_pack_bits(weight.codes), weight.scale};
}

// Gradients of x, w and the bias, each in the dtype of what it is of, where it is needed; else nothing.
gradients::Gradients cpu_fused_gradients(const Tensor& grad, const Tensor& x_q, const Tensor& x_scale, const Tensor& bits,
                                         const Tensor& scale, int64_t k, bool bf16, std::optional<ScalarType> of_x, bool of_w,
                                         std::optional<ScalarType> of_bias) {
  STD_TORCH_CHECK(x_q.is_contiguous() && x_q.scalar_type() == ScalarType::Char && x_q.size(x_q.dim() - 1) == k,
                  "x_q must be contiguous int8 [..., ", k, "]");
  const int64_t m = x_q.numel() / k;
  const auto* codes = static_cast<const int8_t*>(x_q.const_data_ptr());
  const float* scales = floats(x_scale, m, "x_scale");
  const auto kind = [](ScalarType dtype) { return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2; };
  const auto values = [&](const Tensor* by, ScalarType dtype) {
    return cpu_dequantize_bits(bits, k, by ? *by : torch::stable::full({1, 1}, 1.0, ScalarType::Float), kind(dtype));
  };
  const auto x_values = [&](ScalarType dtype) { return floats_of(codes, m, k, scales, 1, dtype); };
  return gradients::all(grad, x_q, x_scale, scale, bf16, of_x, of_w, of_bias, values, x_values);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def(
      "cpu_fused_linear(Tensor x, Tensor w, Tensor? bias, ScalarType dtype, int rows, int groups, bool binary, float multiplier,"
      " float least, float most, int rounds_to, bool per_tensor, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_fused_gradients(Tensor grad, Tensor x_q, Tensor x_scale, Tensor bits, Tensor w_scale, int k, bool bf16,"
      " ScalarType? of_x, bool of_w, ScalarType? of_bias) -> (Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_fused_linear", TORCH_BOX(&cpu_fused_linear));
  m.impl("cpu_fused_gradients", TORCH_BOX(&cpu_fused_gradients));
}

}  // namespace qat::binding
