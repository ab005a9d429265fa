// The backward matmuls of the training linear, as `qat.ops.gradients` has them and by the same ops of torch: what the CPU's and the
// GPU's one op for them share. Of what a forward pass kept for them, `Kept`, they ask what they need:
//     weight(scaled, dtype)    the floats [N, K] that the weight's codes are, with their scales or without
//     scale()                  those scales, float32 [1 | N, 1 | G]
//     input(dtype)             the floats [M, K] that the codes of x are, with their scales
//     x_codes(), x_scale()     int8 [..., K] and float32 [..., 1]
//     float_sums()             whether torch's matmul there writes 16-bit operands' sums as float32: CUDA's does
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace qat::gradients {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of x, w and the bias, where they are needed.
using Gradients = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

inline Tensor times(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor in(const Tensor& x, ScalarType dtype) { return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype); }

inline Tensor rows_of(const Tensor& x) { return x.dim() == 2 ? x : torch::stable::reshape(x, {-1, x.size(x.dim() - 1)}); }

inline Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

// _input_gradient, or _bf16_gradient.
template <class Kept>
Tensor of_input(const Tensor& grad, const Kept& kept, bool bf16) {
  constexpr ScalarType kHalf = ScalarType::BFloat16;
  if (!bf16) return torch::stable::matmul(grad, kept.weight(true, grad.scalar_type()));
  const Tensor scale = kept.scale();
  if (scale.size(1) > 1) return torch::stable::matmul(in(grad, kHalf), kept.weight(true, kHalf));
  if (scale.size(0) > 1) return torch::stable::matmul(in(times(grad, transposed(scale)), kHalf), kept.weight(false, kHalf));
  return times(torch::stable::matmul(in(grad, kHalf), kept.weight(false, kHalf)), torch::stable::reshape(scale, {}));
}

// a^T . b of matrices; `product` of qat.ops.gradients, for float32.
inline Tensor product(const Tensor& a, const Tensor& b, bool float_sums) {
  const bool half = a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Half;
  if (!float_sums || !half) return torch::stable::matmul(transposed(a), b);
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(transposed(a)), from(b), from(ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// input_weight_gradient, or _bf16_weight_gradient.
template <class Kept>
Tensor of_weight(const Tensor& grad, const Kept& kept, bool bf16) {
  if (!bf16) return product(rows_of(grad), kept.input(grad.scalar_type()), kept.float_sums());
  const Tensor rows = rows_of(in(times(grad, kept.x_scale()), ScalarType::BFloat16));
  return product(rows, rows_of(in(kept.x_codes(), ScalarType::BFloat16)), kept.float_sums());
}

inline Tensor of_bias(const Tensor& grad) {
  const std::array<int64_t, 1> first{0};
  return torch::stable::sum(rows_of(grad), torch::headeronly::IntHeaderOnlyArrayRef(first), false, ScalarType::Float);
}

// Each in the dtype of what it is of: `x_dtype` and `bias_dtype` say which are needed, and latent weights are float32.
template <class Kept>
Gradients all(const Tensor& grad, const Kept& kept, bool bf16, std::optional<ScalarType> x_dtype, bool weight,
              std::optional<ScalarType> bias_dtype) {
  std::optional<Tensor> x, w, bias;
  if (x_dtype) x = in(of_input(grad, kept, bf16), *x_dtype);
  if (weight) w = in(of_weight(grad, kept, bf16), ScalarType::Float);
  if (bias_dtype) bias = in(of_bias(grad), *bias_dtype);
  return {x, w, bias};
}

}  // namespace qat::gradients
