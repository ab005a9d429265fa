// What cuda/platform.h has of the device, on the machine of the emulation.
#pragma once
#include "machine.h"

namespace qat::cuda {

inline int compute_capability() { return 90; }
inline int multiprocessors() { return 132; }

inline unsigned char* shared_memory() { return static_cast<unsigned char*>(emulation::machine.shared->get()); }

template <class P>
int launch(void (*kernel)(P), dim3 grid, unsigned threads, std::size_t shared_bytes, cudaStream_t, const P& parameters,
           bool overlap = false) {
  return emulation::launch(kernel, grid, threads, shared_bytes, parameters, overlap);
}

}  // namespace qat::cuda
