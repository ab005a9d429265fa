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

#include <algorithm>
#include <array>
#include <initializer_list>
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
  // Which capture into a graph its work belongs to; 0: to none.
  int64_t capture() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    const auto error = cudaStreamGetCaptureInfo(get(), &status, &id);
    STD_TORCH_CHECK(error == cudaSuccess, "cudaStreamGetCaptureInfo failed: ", cudaGetErrorString(error));
    return status == cudaStreamCaptureStatusNone ? 0 : static_cast<int64_t>(id) + 1;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }
inline bool float_sums() { return true; }
inline const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace qat::cuda::binding

#endif

namespace qat::cuda::binding {

// A shape, without memory of the heap.
struct Sizes {
  Sizes(std::initializer_list<int64_t> sizes) : dim(static_cast<int64_t>(sizes.size())) {
    std::copy(sizes.begin(), sizes.end(), values.begin());
  }
  explicit Sizes(int64_t n) : dim(n) { STD_TORCH_CHECK(n <= static_cast<int64_t>(values.size()), "too many dimensions: ", n); }
  int64_t* data() { return values.data(); }
  const int64_t* data() const { return values.data(); }

  int64_t dim;
  std::array<int64_t, 64> values;  // as many as torch allows; those beyond dim hold nothing
};

// The strides of contiguous rows.
inline Sizes rows_of_memory(const Sizes& sizes) {
  Sizes strides(sizes.dim);
  int64_t step = 1;
  for (int64_t i = sizes.dim; i-- > 0; step *= sizes.values[i] > 0 ? sizes.values[i] : 1) strides.values[i] = step;
  return strides;
}

inline int32_t type_of(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

// Memory in parts, each of which begins 16-byte aligned: what lives as long is allocated once, as an allocation takes a CPU as long
// as a launch.
class Parts {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = total_;
    total_ += (bytes + 15) / 16 * 16;
    return at;
  }
  int64_t bytes() const { return total_; }

 private:
  int64_t total_ = 0;
};

// Of a tensor of bytes, those from `at` on as a tensor of its own, which shares its memory.
inline Tensor part_of(const Tensor& bytes, int64_t at, const Sizes& sizes, ScalarType dtype) {
  const Sizes strides = rows_of_memory(sizes);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__alloc_from_pool(bytes.get(), at, type_of(dtype), sizes.dim, sizes.data(), strides.data(),
                                                     &handle));
  return Tensor(handle);
}

// Where x is: it becomes the current device, and what is allocated here lies there too.
struct __attribute__((visibility("hidden"))) Device {
  explicit Device(const Tensor& x) : index(x.get_device_index()), guard(index), stream(guard.get()) {}
  const int32_t index;
  const Stream guard;
  const cudaStream_t stream;

  Tensor empty(const Sizes& sizes, ScalarType dtype) const {
    const Sizes strides = rows_of_memory(sizes);
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.dim, sizes.data(), strides.data(), type_of(dtype), device_type(), index,
                                                    &handle));
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
inline Sizes with_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 1, "x must be [..., K]");
  Sizes shape(static_cast<int64_t>(sizes.size()));
  std::copy(sizes.begin(), sizes.end(), shape.values.begin());
  shape.values[shape.dim - 1] = last;
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

// Memory for the sums of K's parts, where the shape takes several.
template <class P>
std::optional<Tensor> with_partial(const Device& device, P& p) {
  const int64_t bytes = partial_bytes(p);
  if (bytes == 0) return std::nullopt;
  Tensor sums = device.empty({bytes / 4}, ScalarType::Int);
  p.partial = static_cast<int32_t*>(sums.mutable_data_ptr());
  return sums;
}

}  // namespace qat::cuda::binding
