// The backward matmuls of the training linear, as `qat.ops.gradients` has them and by the same ops of torch: what the CPU's and the
// GPU's one op for them share. `values(scale, dtype)` are the floats [N, K] that the weight's codes are with scales [1 | N, G].
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

// _input_gradient, or _bf16_gradient.
template <class Values>
Tensor of_input(const Tensor& grad, const Tensor& scale, bool bf16, const Values& values) {
  constexpr ScalarType kHalf = ScalarType::BFloat16;
  if (!bf16) return torch::stable::matmul(grad, values(&scale, grad.scalar_type()));
  if (scale.size(1) > 1) return torch::stable::matmul(in(grad, kHalf), values(&scale, kHalf));
  if (scale.size(0) > 1)
    return torch::stable::matmul(in(times(grad, torch::stable::transpose(scale, 0, 1)), kHalf), values(nullptr, kHalf));
  return times(torch::stable::matmul(in(grad, kHalf), values(nullptr, kHalf)), torch::stable::reshape(scale, {}));
}

// input_weight_gradient, or _bf16_weight_gradient; `x_values(dtype)` are the floats [M, K] that the codes of x are.
template <class Values>
Tensor of_weight(const Tensor& grad, const Tensor& x_q, const Tensor& x_scale, bool bf16, const Values& x_values) {
  const Tensor rows = rows_of(bf16 ? in(times(grad, x_scale), ScalarType::BFloat16) : grad);
  const Tensor values = bf16 ? rows_of(in(x_q, ScalarType::BFloat16)) : x_values(grad.scalar_type());
  return torch::stable::matmul(torch::stable::transpose(rows, 0, 1), values);
}

inline Tensor of_bias(const Tensor& grad) {
  const std::array<int64_t, 1> first{0};
  return torch::stable::sum(rows_of(grad), torch::headeronly::IntHeaderOnlyArrayRef(first), false, ScalarType::Float);
}

// Each in the dtype of what it is of: `x_dtype` and `bias_dtype` say which are needed, and latent weights are float32.
template <class Values, class Inputs>
Gradients all(const Tensor& grad, const Tensor& x_q, const Tensor& x_scale, const Tensor& scale, bool bf16,
              std::optional<ScalarType> x_dtype, bool weight, std::optional<ScalarType> bias_dtype, const Values& values,
              const Inputs& x_values) {
  std::optional<Tensor> x, w, bias;
  if (x_dtype) x = in(of_input(grad, scale, bf16, values), *x_dtype);
  if (weight) w = in(of_weight(grad, x_q, x_scale, bf16, x_values), ScalarType::Float);
  if (bias_dtype) bias = in(of_bias(grad), *bias_dtype);
  return {x, w, bias};
}

}  // namespace qat::gradients
