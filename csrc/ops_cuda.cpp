// The linears on a GPU as torch ops, as ops_cpu.cpp has them on the CPU: this checks shapes and devices, allocates, and hands
// the current stream to cuda/kernels.h. The ops are below autograd and are not for users: qat/ops/cuda.py calls them and says
// what a user did wrong.
#include <optional>
#include <tuple>

#include "ops_cuda.h"

namespace qat::cuda::binding {
namespace {

// y [..., N] of x's shape and dtype, and how it is made of the sums: scale [1 | N, 1 | G] and bias [N].
struct Result {
  Tensor y;
  int64_t groups;
  Output out;
};

Result make_result(const Device& device, const Tensor& x, int64_t n, const Tensor& scale, const std::optional<Tensor>& bias) {
  const int64_t k = x.size(x.dim() - 1), groups = scale.dim() == 2 ? scale.size(1) : 0;
  device.check(scale, ScalarType::Float, "scale");
  STD_TORCH_CHECK(groups >= 1 && (scale.size(0) == 1 || scale.size(0) == n), "scale must be [1 | N, 1 | G]");
  STD_TORCH_CHECK(k <= kMaxWidth && k % groups == 0, "unsupported K = ", k, " in ", groups, " groups");
  if (bias) {
    device.check(*bias, ScalarType::Float, "bias");
    STD_TORCH_CHECK(bias->numel() == n, "bias must be [N]");
  }
  Result result = {device.empty(with_last(x, n), x.scalar_type()), groups, {}};
  result.out.y = result.y.mutable_data_ptr();
  result.out.dtype = dtype_of(x.scalar_type());
  result.out.scale = static_cast<const float*>(scale.const_data_ptr());
  result.out.scale_stride = scale.size(0) == 1 ? 0 : groups;
  result.out.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  return result;
}

// Quantizes x [..., K] into codes, divisor and scale, where they are given.
void quantize(const Device& device, const Tensor& x, bool per_tensor, double eps, Tensor& codes, Tensor* divisor,
              Tensor* scale) {
  std::optional<Tensor> workspace;
  if (per_tensor) workspace = device.empty({kWorkspaceBytes}, ScalarType::Byte);
  QuantizeActivation p = {};
  p.x = x.const_data_ptr();
  p.dtype = dtype_of(x.scalar_type());
  p.m = rows_of(x);
  p.k = x.size(x.dim() - 1);
  p.per_tensor = per_tensor;
  p.eps = static_cast<float>(eps);
  p.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  p.divisor = divisor ? static_cast<float*>(divisor->mutable_data_ptr()) : nullptr;
  p.scale = scale ? static_cast<float*>(scale->mutable_data_ptr()) : nullptr;
  p.workspace = workspace ? workspace->mutable_data_ptr() : nullptr;
  done(quantize_activation(p, device.stream), "quantize_activation");
}

std::tuple<Tensor, Tensor> cuda_quantize_activation(const Tensor& x_any, bool per_tensor, double eps) {
  const Device device(x_any);
  const Tensor x = rows_in_memory(x_any);
  Tensor codes = device.empty(with_last(x, x.size(x.dim() - 1)), ScalarType::Char);
  Tensor scale = device.empty(with_last(x, 1), ScalarType::Float);
  quantize(device, x, per_tensor, eps, codes, nullptr, &scale);
  return {codes, scale};
}

// The same with the dividing scale between them.
std::tuple<Tensor, Tensor, Tensor> cuda_activation_codes(const Tensor& x_any, bool per_tensor, double eps) {
  const Device device(x_any);
  const Tensor x = rows_in_memory(x_any);
  Tensor codes = device.empty(with_last(x, x.size(x.dim() - 1)), ScalarType::Char);
  Tensor divisor = device.empty(with_last(x, 1), ScalarType::Float), scale = device.empty(with_last(x, 1), ScalarType::Float);
  quantize(device, x, per_tensor, eps, codes, &divisor, &scale);
  return {codes, divisor, scale};
}

// y of x and 2-bit bytes; one token takes one launch. For `overlap` see cuda/kernels.h.
Tensor cuda_packed_linear(const Tensor& x_any, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                          int64_t k, bool per_tensor, double eps, bool overlap) {
  const Device device(x_any);
  const Tensor x = rows_in_memory(x_any);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x must be [..., ", k, "]");
  const uint8_t* bytes = bytes_of(device, packed, k, 4);
  const Result result = make_result(device, x, packed.size(0), scale, bias);
  PackedLinear p = {};
  p.x = x.const_data_ptr();
  p.per_tensor = per_tensor;
  p.eps = static_cast<float>(eps);
  p.packed = bytes;
  p.m = rows_of(x);
  p.n = packed.size(0);
  p.k = k;
  p.groups = result.groups;
  p.out = result.out;
  p.overlap = overlap;
  // Scratch memory goes back to torch's allocator at the end, which gives it to later work of this stream only.
  std::vector<Tensor> scratch;
  if (!packed_linear_fused(p)) {
    scratch = {device.empty({p.m * padded_width(k, p.groups)}, ScalarType::Char),
               device.empty({p.m}, ScalarType::Float),
               device.empty({per_tensor ? kWorkspaceBytes : 0}, ScalarType::Byte)};
    p.codes = static_cast<int8_t*>(scratch[0].mutable_data_ptr());
    p.divisor = static_cast<float*>(scratch[1].mutable_data_ptr());
    p.workspace = scratch[2].mutable_data_ptr();
  }
  const auto sums = with_partial(device, p);
  done(packed_linear(p, device.stream), "packed_linear");
  return result.y;
}

// y of x and int8 codes t [N, K]; and the codes and scale of x, for the backward pass.
std::tuple<Tensor, Tensor, Tensor> cuda_bitlinear(const Tensor& x_any, const Tensor& t, const Tensor& scale,
                                                  const std::optional<Tensor>& bias, bool per_tensor, double eps) {
  const Device device(x_any);
  const Tensor x = rows_in_memory(x_any);
  const int64_t k = x.size(x.dim() - 1), m = rows_of(x);
  device.check(t, ScalarType::Char, "t");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == k, "t must be [N, ", k, "]");
  const Result result = make_result(device, x, t.size(0), scale, bias);
  Tensor codes = device.empty(with_last(x, k), ScalarType::Char);
  Tensor divisor = device.empty({m}, ScalarType::Float), x_scale = device.empty(with_last(x, 1), ScalarType::Float);
  quantize(device, x, per_tensor, eps, codes, &divisor, &x_scale);
  Linear p = {};
  p.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  p.divisor = static_cast<const float*>(divisor.const_data_ptr());
  p.t = static_cast<const int8_t*>(t.const_data_ptr());
  p.m = m;
  p.n = t.size(0);
  p.k = k;
  p.groups = result.groups;
  p.out = result.out;
  const auto sums = with_partial(device, p);
  done(linear(p, device.stream), "linear");
  return {result.y, codes, x_scale};
}

// int32 [M, N] of int8 a [M, K] and b [N, K]: a . b^T
Tensor cuda_int8_matmul(const Tensor& a, const Tensor& b) {
  const Device device(a);
  device.check(a, ScalarType::Char, "a");
  device.check(b, ScalarType::Char, "b");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.size(1) <= kMaxWidth,
                  "a and b must be [M, K] and [N, K]");
  Tensor y = device.empty({a.size(0), b.size(0)}, ScalarType::Int);
  Linear p = {};
  p.codes = static_cast<const int8_t*>(a.const_data_ptr());
  p.t = static_cast<const int8_t*>(b.const_data_ptr());
  p.m = a.size(0);
  p.n = b.size(0);
  p.k = a.size(1);
  p.groups = 1;
  p.out.y = y.mutable_data_ptr();
  p.raw = true;
  const auto sums = with_partial(device, p);
  done(linear(p, device.stream), "int8_matmul");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cuda_quantize_activation(Tensor x, bool per_tensor, float eps) -> (Tensor, Tensor)");
  m.def("cuda_activation_codes(Tensor x, bool per_tensor, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_packed_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int k, bool per_tensor, float eps, bool overlap)"
      " -> Tensor");
  m.def(
      "cuda_bitlinear(Tensor x, Tensor t, Tensor scale, Tensor? bias, bool per_tensor, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("cuda_int8_matmul(Tensor a, Tensor b) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, QAT_DEVICE, m) {
  m.impl("cuda_quantize_activation", TORCH_BOX(&cuda_quantize_activation));
  m.impl("cuda_activation_codes", TORCH_BOX(&cuda_activation_codes));
  m.impl("cuda_packed_linear", TORCH_BOX(&cuda_packed_linear));
  m.impl("cuda_bitlinear", TORCH_BOX(&cuda_bitlinear));
  m.impl("cuda_int8_matmul", TORCH_BOX(&cuda_int8_matmul));
}

}  // namespace qat::cuda::binding
