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

// Of the current device, as in sm_90.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
}

// `overlap`: the kernel may start before the one ahead of it on the stream has ended (it then calls wait_for_previous).
template <class P>
int launch(void (*kernel)(P), dim3 grid, unsigned threads, std::size_t shared_bytes, cudaStream_t stream, const P& parameters,
           bool overlap = false) {
  if (shared_bytes > kDefaultShared) {
    const auto limit =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
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
  config.numAttrs = overlap && compute_capability() >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, parameters);
}

}  // namespace qat::cuda

#endif
