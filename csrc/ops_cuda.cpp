// What ops.cpp is for the CPU: the CUDA kernels as torch ops, through torch's stable ABI (torch 2.11 and later). It checks
// shapes and devices, allocates, and hands the current stream to cuda/kernels.h. The ops are below autograd and are not
// for users: qat/ops/cuda.py calls them and says what a user did wrong. Nothing here waits for the device.
//
// With QAT_EMULATE the kernels run on the CPU (cuda/emulation.h) and so do these ops, for the tests.
//
// Legend: M tokens, N out_features, K in_features, G groups along K.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/kernels.h"

#if defined(QAT_EMULATE)
#define QAT_DEVICE CPU
#else
#define QAT_DEVICE CUDA
#include <cuda_runtime_api.h>

// The one symbol that only a torch with CUDA has (libtorch_cuda). Weak, so that this file links and loads beside a CPU
// torch as well, where no CUDA tensor can ever reach it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(QAT_EMULATE)

struct Stream {
  explicit Stream(int32_t) {}
  cudaStream_t get() const { return nullptr; }
};
int32_t device_type() { return aoti_torch_device_type_cpu(); }
const char* message(int) { return "the emulation says why"; }

#else

// Makes a device the current one while it lives, and knows its stream.
class Stream {
 public:
  explicit Stream(int32_t index) : guard_(index) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream_));
  }
  cudaStream_t get() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
int32_t device_type() { return aoti_torch_device_type_cuda(); }
const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#endif

// Where x is: it becomes the current device, and what is allocated here lies there too.
struct Device {
  explicit Device(const Tensor& x) : index(x.get_device_index()), guard(index), stream(guard.get()) {}
  const int32_t index;
  const Stream guard;
  const cudaStream_t stream;

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) const {
    std::vector<int64_t> strides(sizes.size());
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0; step *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = step;
    const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type,
                                                           device_type(), index, &handle));
    return Tensor(handle);
  }

  void check(const Tensor& x, ScalarType dtype, const char* name) const {
    int32_t type = -1;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
    STD_TORCH_CHECK(type == device_type() && x.get_device_index() == index, name, " is not on CUDA device ", index);
    STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous(), name, " has a wrong dtype or is not contiguous");
  }
};

void done(int error, const char* what) { STD_TORCH_CHECK(error == 0, what, " failed: ", message(error)); }

qat::cuda::Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return qat::cuda::Dtype::f32;
    case ScalarType::BFloat16: return qat::cuda::Dtype::bf16;
    case ScalarType::Half: return qat::cuda::Dtype::f16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

Tensor rows_in_memory(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// The sizes of x [..., K] with another last one, and the number of rows.
std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 1, "x must be [..., K]");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

const uint8_t* bytes_of(const Device& device, const Tensor& packed, int64_t k, int64_t per_byte) {
  device.check(packed, ScalarType::Byte, "packed");
  STD_TORCH_CHECK(packed.dim() == 2 && packed.size(1) == (k + per_byte - 1) / per_byte, "packed does not fit K = ", k);
  return static_cast<const uint8_t*>(packed.const_data_ptr());
}

// y [..., N] of x's shape and dtype, and how it is made of the sums: scale [1 | N, 1 | G] and bias [N].
struct Result {
  Tensor y;
  int64_t groups;
  qat::cuda::Output out;
};

Result make_result(const Device& device, const Tensor& x, int64_t n, const Tensor& scale, const std::optional<Tensor>& bias) {
  const int64_t k = x.size(x.dim() - 1), groups = scale.dim() == 2 ? scale.size(1) : 0;
  device.check(scale, ScalarType::Float, "scale");
  STD_TORCH_CHECK(groups >= 1 && (scale.size(0) == 1 || scale.size(0) == n), "scale must be [1 | N, 1 | G]");
  STD_TORCH_CHECK(k <= qat::cuda::kMaxWidth && k % groups == 0, "unsupported K = ", k, " in ", groups, " groups");
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
  const Tensor workspace = device.empty({per_tensor ? qat::cuda::kWorkspaceBytes : 0}, ScalarType::Byte);
  qat::cuda::QuantizeActivation p = {};
  p.x = x.const_data_ptr();
  p.dtype = dtype_of(x.scalar_type());
  p.m = rows_of(x);
  p.k = x.size(x.dim() - 1);
  p.per_tensor = per_tensor;
  p.eps = static_cast<float>(eps);
  p.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  p.divisor = divisor ? static_cast<float*>(divisor->mutable_data_ptr()) : nullptr;
  p.scale = scale ? static_cast<float*>(scale->mutable_data_ptr()) : nullptr;
  p.workspace = workspace.mutable_data_ptr();
  done(qat::cuda::quantize_activation(p, device.stream), "quantize_activation");
}

std::tuple<Tensor, Tensor> cuda_quantize_activation(const Tensor& x_any, bool per_tensor, double eps) {
  const Device device(x_any);
  const Tensor x = rows_in_memory(x_any);
  Tensor codes = device.empty(with_last(x, x.size(x.dim() - 1)), ScalarType::Char);
  Tensor scale = device.empty(with_last(x, 1), ScalarType::Float);
  quantize(device, x, per_tensor, eps, codes, nullptr, &scale);
  return {codes, scale};
}

// Codes int8 t [N, K], or their 2-bit bytes if `packed`, and the scale [1 | N, 1 | G], which is `given` for a reduction
// that the kernels do not have.
std::tuple<Tensor, Tensor> cuda_quantize_weight(const Tensor& w_any, int64_t granularity, int64_t reduce, int64_t groups,
                                                bool binary, int64_t scale_dtype, double eps,
                                                const std::optional<Tensor>& given, bool packed) {
  using qat::cuda::Granularity;
  using qat::cuda::Reduce;
  const Device device(w_any);
  STD_TORCH_CHECK(w_any.dim() == 2 && groups >= 1 && w_any.size(1) % groups == 0, "w must be [N, K] with K in ", groups,
                  " groups");
  STD_TORCH_CHECK((static_cast<Reduce>(reduce) == Reduce::given) == given.has_value(),
                  "a scale is given for Reduce::given alone");
  const Tensor w = rows_in_memory(w_any), workspace = device.empty({qat::cuda::kWorkspaceBytes}, ScalarType::Byte);
  const int64_t n = w.size(0), k = w.size(1), rows = static_cast<Granularity>(granularity) == Granularity::tensor ? 1 : n;
  STD_TORCH_CHECK(!packed || groups == 1 || k / groups % 4 == 0, "groups of a packed weight must be multiples of 4");
  Tensor codes = packed ? device.empty({n, (k + 3) / 4}, ScalarType::Byte) : device.empty({n, k}, ScalarType::Char);
  Tensor scale = given ? *given : device.empty({rows, groups}, ScalarType::Float);
  device.check(scale, ScalarType::Float, "scale");
  STD_TORCH_CHECK(scale.numel() == rows * groups, "scale must be [1 | N, 1 | G]");
  qat::cuda::QuantizeWeight p = {};
  p.w = w.const_data_ptr();
  p.dtype = dtype_of(w.scalar_type());
  p.n = n;
  p.k = k;
  p.groups = groups;
  p.granularity = static_cast<Granularity>(granularity);
  p.reduce = static_cast<Reduce>(reduce);
  p.binary = binary;
  p.scale_dtype = static_cast<qat::cuda::Dtype>(scale_dtype);
  p.eps = static_cast<float>(eps);
  p.t = packed ? nullptr : static_cast<int8_t*>(codes.mutable_data_ptr());
  p.packed = packed ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr;
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  done(qat::cuda::quantize_weight(p, device.stream), "quantize_weight");
  return {codes, scale};
}

// y of x and 2-bit bytes; one token takes one launch. For `overlap` see cuda/kernels.h.
Tensor cuda_packed_linear(const Tensor& x_any, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                          int64_t k, bool per_tensor, double eps, bool overlap) {
  const Device device(x_any);
  const Tensor x = rows_in_memory(x_any);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x must be [..., ", k, "]");
  const uint8_t* bytes = bytes_of(device, packed, k, 4);
  const Result result = make_result(device, x, packed.size(0), scale, bias);
  qat::cuda::PackedLinear p = {};
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
  if (!qat::cuda::packed_linear_fused(p)) {
    scratch = {device.empty({p.m * qat::cuda::padded_width(k, p.groups)}, ScalarType::Char),
               device.empty({p.m}, ScalarType::Float),
               device.empty({per_tensor ? qat::cuda::kWorkspaceBytes : 0}, ScalarType::Byte)};
    p.codes = static_cast<int8_t*>(scratch[0].mutable_data_ptr());
    p.divisor = static_cast<float*>(scratch[1].mutable_data_ptr());
    p.workspace = scratch[2].mutable_data_ptr();
  }
  done(qat::cuda::packed_linear(p, device.stream), "packed_linear");
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
  qat::cuda::Linear p = {};
  p.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  p.divisor = static_cast<const float*>(divisor.const_data_ptr());
  p.t = static_cast<const int8_t*>(t.const_data_ptr());
  p.m = m;
  p.n = t.size(0);
  p.k = k;
  p.groups = result.groups;
  p.out = result.out;
  done(qat::cuda::linear(p, device.stream), "linear");
  return {result.y, codes, x_scale};
}

// int32 [M, N] of int8 a [M, K] and b [N, K]: a . b^T
Tensor cuda_int8_matmul(const Tensor& a, const Tensor& b) {
  const Device device(a);
  device.check(a, ScalarType::Char, "a");
  device.check(b, ScalarType::Char, "b");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.size(1) <= qat::cuda::kMaxWidth,
                  "a and b must be [M, K] and [N, K]");
  Tensor y = device.empty({a.size(0), b.size(0)}, ScalarType::Int);
  qat::cuda::Linear p = {};
  p.codes = static_cast<const int8_t*>(a.const_data_ptr());
  p.t = static_cast<const int8_t*>(b.const_data_ptr());
  p.m = a.size(0);
  p.n = b.size(0);
  p.k = a.size(1);
  p.groups = 1;
  p.out.y = y.mutable_data_ptr();
  p.raw = true;
  done(qat::cuda::linear(p, device.stream), "int8_matmul");
  return y;
}

// `bad`, int64 [1] holding -1, becomes the smallest flat index of what holds no ternary code.
uint64_t* first_bad(const Device& device, Tensor& bad) {
  device.check(bad, ScalarType::Long, "bad");
  STD_TORCH_CHECK(bad.numel() == 1, "bad must be [1]");
  return static_cast<uint64_t*>(bad.mutable_data_ptr());
}

qat::cuda::Layout layout_of(bool base3) { return base3 ? qat::cuda::Layout::base3 : qat::cuda::Layout::bits; }

Tensor cuda_pack(const Tensor& t, bool base3, Tensor bad) {
  const Device device(t);
  device.check(t, ScalarType::Char, "t");
  const int64_t n = t.size(0), k = t.size(1), per_byte = base3 ? 5 : 4;
  Tensor packed = device.empty({n, (k + per_byte - 1) / per_byte}, ScalarType::Byte);
  done(qat::cuda::pack(static_cast<const int8_t*>(t.const_data_ptr()), n, k, layout_of(base3),
                       static_cast<uint8_t*>(packed.mutable_data_ptr()), first_bad(device, bad), device.stream),
       "pack");
  return packed;
}

Tensor cuda_unpack(const Tensor& packed, int64_t k, bool base3, Tensor bad) {
  const Device device(packed);
  const uint8_t* bytes = bytes_of(device, packed, k, base3 ? 5 : 4);
  Tensor t = device.empty({packed.size(0), k}, ScalarType::Char);
  done(qat::cuda::unpack(bytes, packed.size(0), k, layout_of(base3), static_cast<int8_t*>(t.mutable_data_ptr()),
                         first_bad(device, bad), device.stream),
       "unpack");
  return t;
}

Tensor cuda_repack(const Tensor& base3, int64_t k) {
  const Device device(base3);
  const uint8_t* bytes = bytes_of(device, base3, k, 5);
  Tensor bits = device.empty({base3.size(0), (k + 3) / 4}, ScalarType::Byte);
  done(qat::cuda::repack(bytes, base3.size(0), k, static_cast<uint8_t*>(bits.mutable_data_ptr()), nullptr, device.stream),
       "repack");
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cuda_quantize_activation(Tensor x, bool per_tensor, float eps) -> (Tensor, Tensor)");
  m.def(
      "cuda_quantize_weight(Tensor w, int granularity, int reduce, int groups, bool binary, int scale_dtype, float eps,"
      " Tensor? given, bool packed) -> (Tensor, Tensor)");
  m.def(
      "cuda_packed_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int k, bool per_tensor, float eps, bool overlap)"
      " -> Tensor");
  m.def(
      "cuda_bitlinear(Tensor x, Tensor t, Tensor scale, Tensor? bias, bool per_tensor, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("cuda_int8_matmul(Tensor a, Tensor b) -> Tensor");
  m.def("cuda_pack(Tensor t, bool base3, Tensor(a!) bad) -> Tensor");
  m.def("cuda_unpack(Tensor packed, int k, bool base3, Tensor(a!) bad) -> Tensor");
  m.def("cuda_repack(Tensor base3, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, QAT_DEVICE, m) {
  m.impl("cuda_quantize_activation", TORCH_BOX(&cuda_quantize_activation));
  m.impl("cuda_quantize_weight", TORCH_BOX(&cuda_quantize_weight));
  m.impl("cuda_packed_linear", TORCH_BOX(&cuda_packed_linear));
  m.impl("cuda_bitlinear", TORCH_BOX(&cuda_bitlinear));
  m.impl("cuda_int8_matmul", TORCH_BOX(&cuda_int8_matmul));
  m.impl("cuda_pack", TORCH_BOX(&cuda_pack));
  m.impl("cuda_unpack", TORCH_BOX(&cuda_unpack));
  m.impl("cuda_repack", TORCH_BOX(&cuda_repack));
}
