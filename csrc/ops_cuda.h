// What the CUDA ops share: torch's tensors, allocator and current stream, through its stable ABI (torch 2.11 and later). With
// QAT_EMULATE the kernels run on the CPU (emulation/) and so do these ops, for the tests. Nothing here waits for the device.
//
// Legend: M tokens, N out_features, K in_features, G groups along K.
#pragma once
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

namespace qat::cuda::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace qat::cuda::binding

#if defined(QAT_EMULATE)
#include "emulation/stream.h"
#else

namespace qat::cuda::binding {

// Makes a device the current one while it lives, and knows its stream. Hidden, as torch's guard is.
class __attribute__((visibility("hidden"))) Stream {
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
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }
inline const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace qat::cuda::binding

#endif

namespace qat::cuda::binding {

// Where x is: it becomes the current device, and what is allocated here lies there too.
struct __attribute__((visibility("hidden"))) Device {
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

inline void done(int error, const char* what) { STD_TORCH_CHECK(error == 0, what, " failed: ", message(error)); }

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

inline Tensor rows_in_memory(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// The sizes of x [..., K] with another last one, and the number of rows.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 1, "x must be [..., K]");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

inline const uint8_t* bytes_of(const Device& device, const Tensor& packed, int64_t k, int64_t per_byte) {
  device.check(packed, ScalarType::Byte, "packed");
  STD_TORCH_CHECK(packed.dim() == 2 && packed.size(1) == (k + per_byte - 1) / per_byte, "packed does not fit K = ", k);
  return static_cast<const uint8_t*>(packed.const_data_ptr());
}

// ops_cuda.cpp: y of x and int8 codes t [N, K]; and the codes and scale of x. ops_cuda_weights.cpp: int8 codes of packed ones.
std::tuple<Tensor, Tensor, Tensor> cuda_bitlinear(const Tensor& x, const Tensor& t, const Tensor& scale,
                                                  const std::optional<Tensor>& bias, bool per_tensor, double eps);
Tensor cuda_unpack(const Tensor& packed, int64_t k, bool base3, Tensor bad);
// codes * scale [N, K] in `dtype`, of int8 or 2-bit codes and a scale [1 | N, 1 | G], or 1 without one.
Tensor cuda_dequantize(const Device& device, const Tensor& codes, int64_t k, const Tensor* scale, ScalarType dtype);

}  // namespace qat::cuda::binding
