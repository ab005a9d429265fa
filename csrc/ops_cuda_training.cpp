// The training linear on a GPU as one op each way: what qat/ops/cuda.py and qat/ops/gradients.py put together of the other ops,
// by the same kernels, but the weight's codes and their 2-bit bytes by one. qat/ops/fused says which layers come here.
//
// What lives as long as one another is one allocation: what the call alone needs, what is kept of x, and what is kept of w.
#include "ops_cuda.h"
#include "ops_gradients.h"

namespace qat::cuda::binding {
namespace {

// What is kept of x [..., K], M rows: codes int8 [M, K], the scales that divide and those that multiply, float32 [M] each.
struct InputParts {
  InputParts(int64_t m, int64_t k) { codes = parts.add(m * k), divisor = parts.add(m * 4), scale = parts.add(m * 4); }
  Parts parts;
  int64_t codes, divisor, scale;
};

// What is kept of w [N, K]: codes in 2 bits [N, ceil(K / 4)], and scales float32 [1 | N, 1 | G].
struct WeightParts {
  WeightParts(int64_t n, int64_t k, Granularity granularity, int64_t groups)
      : rows(granularity == Granularity::tensor ? 1 : n), groups(groups) {
    bits = parts.add(n * ((k + 3) / 4)), scale = parts.add(rows * groups * 4);
  }
  Parts parts;
  int64_t rows, groups, bits, scale;
};

// What a call alone needs: a kernel's workspace, which the next one may have when it has ended, and codes of w int8 [N, K].
struct ScratchParts {
  ScratchParts(int64_t n, int64_t k) { workspace = parts.add(kWorkspaceBytes), codes = parts.add(n * k); }
  Parts parts;
  int64_t workspace, codes;
};

uint8_t* allocated(const Device& device, const Parts& parts, Tensor& out) {
  out = device.empty({parts.bytes()}, ScalarType::Byte);
  return static_cast<uint8_t*>(out.mutable_data_ptr());
}

float* floats(uint8_t* at) { return reinterpret_cast<float*>(at); }
const float* floats(const uint8_t* at) { return reinterpret_cast<const float*>(at); }
int8_t* codes(uint8_t* at) { return reinterpret_cast<int8_t*>(at); }

// (y in `dtype`, to which x is cast first; for the backward pass what is kept of x and of w, in bytes; the stream and the capture
// that they are of, or 0). `known` is what another layer kept of the same x: where it is of the same stream and capture, x is not
// quantized again. Otherwise it may not be there yet, or not at all.
std::tuple<Tensor, Tensor, Tensor, int64_t, int64_t> cuda_fused_forward(
    const Tensor& x_any, const Tensor& w, const std::optional<Tensor>& bias_any, int64_t granularity, int64_t reduce,
    int64_t groups, bool binary, int64_t scale_dtype, bool per_tensor, double eps, ScalarType dtype, const std::optional<Tensor>& known,
    int64_t stream, int64_t capture) {
  const Device device(x_any);
  device.check(w, ScalarType::Float, "w");
  STD_TORCH_CHECK(w.dim() == 2 && groups >= 1 && w.size(1) % groups == 0 && static_cast<Reduce>(reduce) != Reduce::given,
                  "w must be [N, K] with K in ", groups, " groups");
  const int64_t n = w.size(0), k = w.size(1);
  STD_TORCH_CHECK(x_any.dim() >= 1 && x_any.size(x_any.dim() - 1) == k && k <= kMaxWidth, "x must be [..., ", k, "]");
  std::optional<Tensor> bias = bias_any;
  if (bias) bias = rows_in_memory(gradients::in(*bias, ScalarType::Float));
  if (bias) device.check(*bias, ScalarType::Float, "bias");
  STD_TORCH_CHECK(!bias || bias->numel() == n, "bias must be [N]");
  const int64_t m = rows_of(x_any), here = reinterpret_cast<int64_t>(device.stream), captured = device.guard.capture();
  const WeightParts of_w(n, k, static_cast<Granularity>(granularity), groups);
  const InputParts of_x(m, k);
  const ScratchParts scratch(n, k);
  const bool quantized = known && stream == here && capture == captured && known->numel() == of_x.parts.bytes();
  Tensor scratch_memory, kept_x, kept_w, y = device.empty(with_last(x_any, n), dtype);
  uint8_t* const at = allocated(device, scratch.parts, scratch_memory);
  if (quantized) kept_x = *known;
  uint8_t* const x_at = quantized ? static_cast<uint8_t*>(kept_x.mutable_data_ptr()) : allocated(device, of_x.parts, kept_x);
  uint8_t* const w_at = allocated(device, of_w.parts, kept_w);

  QuantizeWeight weight = {};
  weight.w = w.const_data_ptr();
  weight.dtype = Dtype::f32;
  weight.n = n;
  weight.k = k;
  weight.groups = groups;
  weight.granularity = static_cast<Granularity>(granularity);
  weight.reduce = static_cast<Reduce>(reduce);
  weight.binary = binary;
  weight.scale_dtype = static_cast<Dtype>(scale_dtype);
  weight.eps = static_cast<float>(eps);
  weight.t = codes(at + scratch.codes);
  weight.packed = w_at + of_w.bits;
  weight.scale = floats(w_at + of_w.scale);
  weight.workspace = at + scratch.workspace;
  done(quantize_weight(weight, device.stream), "quantize_weight");

  if (!quantized) {
    const Tensor x = rows_in_memory(gradients::in(x_any, dtype));
    QuantizeActivation input = {};
    input.x = x.const_data_ptr();
    input.dtype = dtype_of(dtype);
    input.m = m;
    input.k = k;
    input.per_tensor = per_tensor;
    input.eps = static_cast<float>(eps);
    input.codes = codes(x_at + of_x.codes);
    input.divisor = floats(x_at + of_x.divisor);
    input.scale = floats(x_at + of_x.scale);
    input.workspace = at + scratch.workspace;
    done(quantize_activation(input, device.stream), "quantize_activation");
  }

  Linear p = {};
  p.codes = codes(x_at + of_x.codes);
  p.divisor = floats(x_at + of_x.divisor);
  p.t = weight.t;
  p.m = m;
  p.n = n;
  p.k = k;
  p.groups = groups;
  p.out.y = y.mutable_data_ptr();
  p.out.dtype = dtype_of(dtype);
  p.out.scale = weight.scale;
  p.out.scale_stride = of_w.rows == 1 ? 0 : groups;
  p.out.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  const auto sums = with_partial(device, p);
  done(linear(p, device.stream), "linear");
  return {y, kept_x, kept_w, here, captured};
}

// Bytes as they were allocated: hooks of saved tensors may give a part of others.
Tensor whole(const Device& device, const Tensor& bytes, const Parts& parts) {
  device.check(bytes, ScalarType::Byte, "what is kept");
  STD_TORCH_CHECK(bytes.numel() == parts.bytes(), "what is kept does not fit the gradient");
  return bytes.storage_offset() == 0 ? bytes : torch::stable::clone(bytes);
}

// What the forward pass kept, as ops_gradients.h asks for it.
class Operands {
 public:
  Operands(const Device& device, const Tensor& grad, const Tensor& kept_x, const Tensor& kept_w, int64_t k, Granularity granularity,
           int64_t groups)
      : device_(device), grad_(grad), m_(binding::rows_of(grad)), n_(grad.size(grad.dim() - 1)), k_(k), of_x_(m_, k),
        of_w_(n_, k, granularity, groups), x_(whole(device, kept_x, of_x_.parts)), w_(whole(device, kept_w, of_w_.parts)),
        x_at_(static_cast<const uint8_t*>(x_.const_data_ptr())), w_at_(static_cast<const uint8_t*>(w_.const_data_ptr())) {}

  Tensor weight(bool scaled, ScalarType dtype) const {
    const float* scale = scaled ? floats(w_at_ + of_w_.scale) : nullptr;
    return values(w_at_ + of_w_.bits, true, n_, scaled ? of_w_.groups : 1, scale, of_w_.rows == 1 ? 0 : of_w_.groups, dtype);
  }
  Tensor input(ScalarType dtype) const { return values(x_at_, false, m_, 1, floats(x_at_ + of_x_.scale), 1, dtype); }
  Tensor scale() const { return part_of(w_, of_w_.scale, {of_w_.rows, of_w_.groups}, ScalarType::Float); }
  Tensor x_codes() const { return part_of(x_, of_x_.codes, {m_, k_}, ScalarType::Char); }
  Tensor x_scale() const { return part_of(x_, of_x_.scale, with_last(grad_, 1), ScalarType::Float); }
  static bool float_sums() { return binding::float_sums(); }

 private:
  Tensor values(const void* codes, bool bits, int64_t rows, int64_t groups, const float* scale, int64_t stride,
                ScalarType dtype) const {
    Tensor out = device_.empty({rows, k_}, dtype);
    done(dequantize(codes, bits, rows, k_, groups, scale, stride, dtype_of(dtype), out.mutable_data_ptr(), device_.stream),
         "dequantize");
    return out;
  }

  const Device& device_;
  const Tensor& grad_;
  int64_t m_, n_, k_;
  InputParts of_x_;
  WeightParts of_w_;
  Tensor x_, w_;
  const uint8_t *x_at_, *w_at_;
};

gradients::Gradients cuda_fused_gradients(const Tensor& grad, const Tensor& kept_x, const Tensor& kept_w, int64_t k,
                                          int64_t granularity, int64_t groups, bool bf16, std::optional<ScalarType> of_x, bool of_w,
                                          std::optional<ScalarType> of_bias) {
  const Device device(grad);
  const Operands kept(device, grad, kept_x, kept_w, k, static_cast<Granularity>(granularity), groups);
  return gradients::all(grad, kept, bf16, of_x, of_w, of_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def(
      "cuda_fused_forward(Tensor x, Tensor w, Tensor? bias, int granularity, int reduce, int groups, bool binary,"
      " int scale_dtype, bool per_tensor, float eps, ScalarType dtype, Tensor? known, int stream, int capture)"
      " -> (Tensor, Tensor, Tensor, int, int)");
  m.def(
      "cuda_fused_gradients(Tensor grad, Tensor kept_x, Tensor kept_w, int k, int granularity, int groups, bool bf16,"
      " ScalarType? of_x, bool of_w, ScalarType? of_bias) -> (Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(qat, QAT_DEVICE, m) {
  m.impl("cuda_fused_forward", TORCH_BOX(&cuda_fused_forward));
  m.impl("cuda_fused_gradients", TORCH_BOX(&cuda_fused_gradients));
}

}  // namespace qat::cuda::binding
