// What every kernel file includes: CUDA, or its emulation on the CPU; and how a kernel is launched. A kernel takes one
// struct of parameters and dynamic shared memory only.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(QAT_EMULATE)
#include "../emulation/machine.h"
#else
#include <cuda_runtime.h>

#include <atomic>
#include <vector>
#endif

namespace qat::cuda {

constexpr int kWarp = 32;
constexpr int kInvalidValue = 1;                  // cudaErrorInvalidValue
constexpr std::size_t kDefaultShared = 48 << 10;  // more must be asked for
constexpr std::size_t kMostShared = 96 << 10;     // what a block may ask for on every GPU from sm_80 on (sm_86: 99 KB)

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace qat::cuda

#if defined(QAT_EMULATE)
#include "../emulation/platform.h"
#else

namespace qat::cuda {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char qat_shared[];
  return qat_shared;
}

constexpr int kMostDevices = 64;

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

// What ASK says of a device, which is not 0; asked once.
template <class Ask>
int kept_of(int device, Ask ask) {
  static std::atomic<int> known[kMostDevices];
  if (device >= kMostDevices) return ask(device);
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0) known[device].store(value = ask(device), std::memory_order_relaxed);
  return value;
}

inline int attribute_of(int device, cudaDeviceAttr which) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// As in sm_90.
inline int compute_capability(int device = current_device()) {
  return kept_of(device, [](int one) {
    return attribute_of(one, cudaDevAttrComputeCapabilityMajor) * 10 + attribute_of(one, cudaDevAttrComputeCapabilityMinor);
  });
}

inline int multiprocessors(int device = current_device()) {
  return kept_of(device, [](int one) { return attribute_of(one, cudaDevAttrMultiProcessorCount); });
}

// Lets a kernel have so much shared memory on a device, and at least kMostShared, so that no thread lowers what another asked
// for; once a thread.
template <class P>
cudaError_t allow_shared(void (*kernel)(P), std::size_t wanted, int device) {
  struct Allowed {
    void (*kernel)(P);
    int device;
    std::size_t bytes;
  };
  thread_local std::vector<Allowed> all;
  const std::size_t bytes = wanted > kMostShared ? wanted : kMostShared;
  for (const Allowed& one : all)
    if (one.kernel == kernel && one.device == device && one.bytes >= bytes) return cudaSuccess;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) all.insert(all.begin(), {kernel, device, bytes});
  return error;
}

// `overlap`: the kernel may start before the one ahead of it on the stream has ended (it then calls wait_for_previous).
template <class P>
int launch(void (*kernel)(P), dim3 grid, unsigned threads, std::size_t shared_bytes, cudaStream_t stream, const P& parameters,
           bool overlap = false) {
  const int device = current_device();
  if (shared_bytes > kDefaultShared) {
    const auto limit = allow_shared(kernel, shared_bytes, device);
    if (limit != cudaSuccess) return limit;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap && compute_capability(device) >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, parameters);
}

}  // namespace qat::cuda

#endif
