// Where the ops of the emulation run: on the CPU, on no stream (ops_cuda.h has the same of a GPU).
#pragma once
#include <cstdlib>

namespace qat::cuda::binding {

struct Stream {
  explicit Stream(int32_t) {}
  cudaStream_t get() const { return nullptr; }
  int64_t capture() const { return 0; }
};
// The CPU's torch has no such matmul: a test gives it one.
inline bool float_sums() { return std::getenv("QAT_EMULATE_FLOAT_SUMS") != nullptr; }
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
inline const char* message(int) { return "the emulation says why"; }

}  // namespace qat::cuda::binding
