// Ops about the machine and its memory: which kernels are in use, a weight's fingerprint, and qat.bench's two limits.
#include "ops_cpu.h"

namespace qat::binding {
namespace {

int64_t cpu_fingerprint(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  const int64_t bytes = x.numel() * x.element_size(), slice = 1 << 18, slices = (bytes + slice - 1) / slice;
  const auto* data = static_cast<const uint8_t*>(x.const_data_ptr());
  std::vector<uint64_t> parts(static_cast<size_t>(slices));
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[static_cast<size_t>(i)] = fingerprint(data + i * slice, bytes - i * slice < slice ? bytes - i * slice : slice);
  });
  return static_cast<int64_t>(fingerprint(parts.data(), slices * 8));
}

// Index of the path in use, portable first. From 0 on, `request` selects one that the CPU has; -1 only asks.
int64_t cpu_isa(int64_t request) {
  const int64_t best = best_isa();
  STD_TORCH_CHECK(request <= best, "this CPU does not have path ", request);
  if (request >= 0) take_isa(static_cast<int>(request));
  for (int64_t i = 0; i < best; ++i)
    if (&isa() == &isa_at(static_cast<int>(i))) return i;
  return best;
}

int64_t cpu_best_isa() { return best_isa(); }

// For qat.bench: read x once, and run so many rounds of dot products on every thread, giving the operations done.
int64_t cpu_read(const Tensor& x) {
  const int64_t words = x.numel() * x.element_size() / 8, slice = 1 << 17, slices = (words + slice - 1) / slice;
  const auto* data = static_cast<const uint64_t*>(x.const_data_ptr());
  std::vector<uint64_t> sums(static_cast<size_t>(slices));
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sums[static_cast<size_t>(i)] = isa().read(data + i * slice, words - i * slice < slice ? words - i * slice : slice);
  });
  uint64_t sum = 0;
  for (uint64_t part : sums) sum += part;
  return static_cast<int64_t>(sum);
}

int64_t cpu_peak(int64_t rounds) {
  if (!isa().peak) return 0;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<int64_t> operations(static_cast<size_t>(threads));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) operations[static_cast<size_t>(i)] = isa().peak(rounds);
  });
  int64_t sum = 0;
  for (int64_t part : operations) sum += part;
  return sum;
}

bool cpu_base3_tiles() { return isa().dot_base3 != nullptr; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cpu_fingerprint(Tensor x) -> int");
  m.def("cpu_isa(int request) -> int");
  m.def("cpu_best_isa() -> int");
  m.def("cpu_base3_tiles() -> bool");
  m.def("cpu_read(Tensor x) -> int");
  m.def("cpu_peak(int rounds) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_fingerprint", TORCH_BOX(&cpu_fingerprint));
  m.impl("cpu_read", TORCH_BOX(&cpu_read));
}

STABLE_TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_best_isa", TORCH_BOX(&cpu_best_isa));
  m.impl("cpu_peak", TORCH_BOX(&cpu_peak));
  m.impl("cpu_base3_tiles", TORCH_BOX(&cpu_base3_tiles));
}

}  // namespace qat::binding
