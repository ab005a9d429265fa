// The training linear as one op each way, for small layers, whose time is that of calls: what qat/ops/cpu.py and
// qat/ops/gradients.py put together of the other ops, in their order and from the same kernels, so that every bit is theirs.
// qat/ops/fused says which layers come here.
#include <array>
#include <tuple>
#include <vector>

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

void check(const Tensor& w, const Quantizer& q) {
  STD_TORCH_CHECK(w.dim() == 2 && w.is_contiguous() && w.scalar_type() == ScalarType::Float && w.numel() > 0 &&
                      w.numel() % q.r == 0 && q.r % q.groups == 0,
                  "w must be contiguous float32 [N, K], in ", q.r, " rows that share a scale");
}

void take_scales(const Tensor& w, const Quantizer& q, float* scale) {
  take_means(w, q.r, w.numel() / q.r, true, scale);
  for (int64_t row = 0; row < q.r; ++row) scale[row] = q.scale(scale[row]);
}

Weight quantized(const Tensor& w, const Quantizer& q) {
  check(w, q);
  const int64_t length = w.numel() / q.r;
  Weight found = {empty({w.size(0), w.size(1)}, ScalarType::Char), empty({q.r / q.groups, q.groups}, ScalarType::Float)};
  auto* scale = static_cast<float*>(found.scale.mutable_data_ptr());
  take_scales(w, q, scale);
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

// (y in `dtype`, to which x is cast first; and for the backward pass: codes of x and their scales, of w in 2 bits, and its
// scales).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_fused_forward(const Tensor& x_any, const Tensor& w,
                                                                     const std::optional<Tensor>& bias_any, int64_t r,
                                                                     int64_t groups, bool binary, double multiplier, double least,
                                                                     double most, int64_t rounds_to, bool per_tensor, double eps,
                                                                     ScalarType dtype) {
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

int64_t kind_of(ScalarType dtype) { return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2; }

// (levels [R, m], borders [R, m - 1]) of rows: `soft` of qat/quantizers/ternary.py and binary.py.
std::tuple<Tensor, Tensor> levels_of(const Tensor& w, const Quantizer& q) {
  const int64_t m = q.binary ? 2 : 3;
  const Scratch<float> scale(q.r), mean(q.binary ? q.r : 0);
  take_scales(w, q, scale.get());
  if (q.binary) take_means(w, q.r, w.numel() / q.r, false, mean.get());
  Tensor levels = empty({q.r, m}, ScalarType::Float), borders = empty({q.r, m - 1}, ScalarType::Float);
  auto *level = static_cast<float*>(levels.mutable_data_ptr()), *border = static_cast<float*>(borders.mutable_data_ptr());
  for (int64_t row = 0; row < q.r; ++row) {
    const float s = scale.get()[row];
    level[row * m] = -s;
    if (!q.binary) level[row * m + 1] = 0.0f;
    level[row * m + m - 1] = s;
    border[row * (m - 1)] = q.binary ? mean.get()[row] : -s / 2.0f;
    if (!q.binary) border[row * 2 + 1] = s / 2.0f;
  }
  return {levels, borders};
}

// While the weight is soft, as `qat.ops.soft.cpu` has it: (y; codes of x, their scales; the soft weight, its slope).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_fused_soft_forward(const Tensor& x_any, const Tensor& w,
                                                                          const std::optional<Tensor>& bias, const Tensor& beta,
                                                                          int64_t r, int64_t groups, bool binary,
                                                                          double multiplier, double least, double most,
                                                                          int64_t rounds_to, double eps, ScalarType dtype) {
  const auto f = [](double value) { return static_cast<float>(value); };
  const Quantizer q = {r, groups, binary, f(multiplier), f(eps), f(least), f(most), rounds_to};
  check(w, q);
  const int64_t n = w.size(0), k = w.size(1);
  const Tensor x = torch::stable::contiguous(gradients::in(x_any, dtype));
  const auto [levels, borders] = levels_of(w, q);
  const Tensor rows = torch::stable::view(w, {r, w.numel() / r});
  const auto [soft, slope] = cpu_soften(rows, levels, borders, *floats(beta, 1, "beta"), kind_of(dtype));
  const Tensor weight = torch::stable::view(soft, {n, k});
  const auto [values, codes, scale] = cpu_rounded(gradients::rows_of(x), eps);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  std::optional<Tensor> own = bias;
  if (own) own = gradients::in(*own, dtype);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(torch::stable::view(values, sizes)),
                                    torch::stable::detail::from(weight), torch::stable::detail::from(own)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor y = torch::stable::detail::to<Tensor>(stack[0]), x_q = torch::stable::view(codes, sizes);
  sizes.back() = 1;
  return {y, x_q, torch::stable::view(scale, sizes), weight, torch::stable::view(slope, {n, k})};
}

// What the forward pass kept of x, as ops_gradients.h asks for it.
class Inputs {
 public:
  Inputs(const Tensor& codes, const Tensor& scale)
      : codes_(codes), scale_(scale), k_(codes.size(codes.dim() - 1)), m_(codes.numel() / k_), scales_(floats(scale, m_, "x_scale")) {
    STD_TORCH_CHECK(codes.is_contiguous() && codes.scalar_type() == ScalarType::Char, "x_q must be contiguous int8");
  }
  Tensor input(ScalarType dtype) const {
    return floats_of(static_cast<const int8_t*>(codes_.const_data_ptr()), m_, k_, scales_, 1, dtype);
  }
  const Tensor& x_codes() const { return codes_; }
  const Tensor& x_scale() const { return scale_; }
  int64_t width() const { return k_; }
  static bool float_sums() { return false; }

 private:
  const Tensor &codes_, &scale_;
  int64_t k_, m_;
  const float* scales_;
};

// And of both.
class Operands : public Inputs {
 public:
  Operands(const Tensor& codes, const Tensor& x_scale, const Tensor& bits, const Tensor& scale)
      : Inputs(codes, x_scale), bits_(bits), scale_(scale) {}
  Tensor weight(bool scaled, ScalarType dtype) const {
    const Tensor by = scaled ? scale_ : torch::stable::full({1, 1}, 1.0, ScalarType::Float);
    return cpu_dequantize_bits(bits_, width(), by, kind_of(dtype));
  }
  const Tensor& scale() const { return scale_; }

 private:
  const Tensor &bits_, &scale_;
};

// `qat.ops.soft.gradients`: _as_it_comes, and the slope.
gradients::Gradients cpu_fused_soft_gradients(const Tensor& grad, const Tensor& x_q, const Tensor& x_scale, const Tensor& weight,
                                              const Tensor& slope, std::optional<ScalarType> of_x, bool of_w,
                                              std::optional<ScalarType> of_bias) {
  const Inputs kept(x_q, x_scale);
  std::optional<Tensor> x, w, bias;
  if (of_x) x = gradients::in(torch::stable::matmul(grad, gradients::in(weight, grad.scalar_type())), *of_x);
  if (of_w) {
    const Tensor through = gradients::in(gradients::of_weight(grad, kept, false), slope.scalar_type());
    w = gradients::in(gradients::times(through, slope), ScalarType::Float);
  }
  if (of_bias) bias = gradients::in(gradients::of_bias(grad), *of_bias);
  return {x, w, bias};
}

// Gradients of x, w and the bias, each in the dtype of what it is of, where it is needed; else nothing.
gradients::Gradients cpu_fused_gradients(const Tensor& grad, const Tensor& x_q, const Tensor& x_scale, const Tensor& bits,
                                         const Tensor& scale, bool bf16, std::optional<ScalarType> of_x, bool of_w,
                                         std::optional<ScalarType> of_bias) {
  return gradients::all(grad, Operands(x_q, x_scale, bits, scale), bf16, of_x, of_w, of_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def(
      "cpu_fused_forward(Tensor x, Tensor w, Tensor? bias, int rows, int groups, bool binary, float multiplier, float least,"
      " float most, int rounds_to, bool per_tensor, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_fused_gradients(Tensor grad, Tensor x_q, Tensor x_scale, Tensor bits, Tensor w_scale, bool bf16,"
      " ScalarType? of_x, bool of_w, ScalarType? of_bias) -> (Tensor?, Tensor?, Tensor?)");
  m.def(
      "cpu_fused_soft_forward(Tensor x, Tensor w, Tensor? bias, Tensor beta, int rows, int groups, bool binary, float multiplier,"
      " float least, float most, int rounds_to, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_fused_soft_gradients(Tensor grad, Tensor x_q, Tensor x_scale, Tensor weight, Tensor slope, ScalarType? of_x,"
      " bool of_w, ScalarType? of_bias) -> (Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_fused_forward", TORCH_BOX(&cpu_fused_forward));
  m.impl("cpu_fused_gradients", TORCH_BOX(&cpu_fused_gradients));
  m.impl("cpu_fused_soft_forward", TORCH_BOX(&cpu_fused_soft_forward));
  m.impl("cpu_fused_soft_gradients", TORCH_BOX(&cpu_fused_soft_gradients));
}

}  // namespace qat::binding
