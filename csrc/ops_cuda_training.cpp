// The training linear on a GPU as one op each way: what qat/ops/cuda.py and qat/ops/gradients.py put together of the other ops, by
// the same kernels, but the weight's codes and their 2-bit bytes by one. qat/ops/fused says which layers come here.
#include "ops_cuda.h"
#include "ops_gradients.h"

namespace qat::cuda::binding {
namespace {

// How a weight is quantized: the first arguments of `cuda_quantize_weight`.
struct How {
  Granularity granularity;
  Reduce reduce;
  int64_t groups;
  bool binary;
  Dtype scale_dtype;
  float eps;
};

struct Weight {
  Tensor codes, bits, scale;
};

Weight quantized(const Device& device, const Tensor& w, const How& how) {
  device.check(w, ScalarType::Float, "w");
  STD_TORCH_CHECK(w.dim() == 2 && how.groups >= 1 && w.size(1) % how.groups == 0 && how.reduce != Reduce::given,
                  "w must be [N, K] with K in ", how.groups, " groups");
  const int64_t n = w.size(0), k = w.size(1), rows = how.granularity == Granularity::tensor ? 1 : n;
  const Tensor workspace = device.empty({kWorkspaceBytes}, ScalarType::Byte);
  Weight found = {device.empty({n, k}, ScalarType::Char), device.empty({n, (k + 3) / 4}, ScalarType::Byte),
                  device.empty({rows, how.groups}, ScalarType::Float)};
  QuantizeWeight p = {};
  p.w = w.const_data_ptr();
  p.dtype = Dtype::f32;
  p.n = n;
  p.k = k;
  p.groups = how.groups;
  p.granularity = how.granularity;
  p.reduce = how.reduce;
  p.binary = how.binary;
  p.scale_dtype = how.scale_dtype;
  p.eps = how.eps;
  p.t = static_cast<int8_t*>(found.codes.mutable_data_ptr());
  p.packed = static_cast<uint8_t*>(found.bits.mutable_data_ptr());
  p.scale = static_cast<float*>(found.scale.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  done(quantize_weight(p, device.stream), "quantize_weight");
  return found;
}

// As `cpu_fused_linear`: (y in `dtype`, to which x is cast first; codes of x, their scales, codes of w in 2 bits, its scales).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_fused_linear(const Tensor& x_any, const Tensor& w,
                                                                     const std::optional<Tensor>& bias_any, ScalarType dtype,
                                                                     int64_t granularity, int64_t reduce, int64_t groups,
                                                                     bool binary, int64_t scale_dtype, bool per_tensor,
                                                                     double eps, bool /*bf16*/) {
  const Device device(x_any);
  const Tensor x = gradients::in(x_any, dtype);
  std::optional<Tensor> bias = bias_any;
  if (bias) bias = rows_in_memory(gradients::in(*bias, ScalarType::Float));
  const How how = {static_cast<Granularity>(granularity), static_cast<Reduce>(reduce), groups, binary,
                   static_cast<Dtype>(scale_dtype), static_cast<float>(eps)};
  const Weight weight = quantized(device, w, how);
  const auto [y, x_q, x_scale] = cuda_bitlinear(x, weight.codes, weight.scale, bias, per_tensor, eps);
  return {y, x_q, x_scale, weight.bits, weight.scale};
}

gradients::Gradients cuda_fused_gradients(const Tensor& grad, const Tensor& x_q, const Tensor& x_scale, const Tensor& bits,
                                          const Tensor& scale, int64_t k, bool bf16, std::optional<ScalarType> of_x, bool of_w,
                                          std::optional<ScalarType> of_bias) {
  const Device device(grad);
  const auto values = [&](const Tensor* by, ScalarType dtype) { return cuda_dequantize(device, bits, k, by, dtype); };
  const auto x_values = [&](ScalarType dtype) {
    const Tensor by = torch::stable::view(x_scale, {x_scale.numel(), 1});
    return cuda_dequantize(device, gradients::rows_of(x_q), k, &by, dtype);
  };
  return gradients::all(grad, x_q, x_scale, scale, bf16, of_x, of_w, of_bias, values, x_values);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def(
      "cuda_fused_linear(Tensor x, Tensor w, Tensor? bias, ScalarType dtype, int granularity, int reduce, int groups, bool binary,"
      " int scale_dtype, bool per_tensor, float eps, bool bf16) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_fused_gradients(Tensor grad, Tensor x_q, Tensor x_scale, Tensor bits, Tensor w_scale, int k, bool bf16,"
      " ScalarType? of_x, bool of_w, ScalarType? of_bias) -> (Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, QAT_DEVICE, m) {
  m.impl("cuda_fused_linear", TORCH_BOX(&cuda_fused_linear));
  m.impl("cuda_fused_gradients", TORCH_BOX(&cuda_fused_gradients));
}

}  // namespace qat::cuda::binding
