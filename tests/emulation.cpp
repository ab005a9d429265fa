// The CUDA kernels on the CPU, for ctypes: memory with guard pages, the launchers, and the emulation's switches.
#include "../csrc/cuda/internal.h"
#include "../csrc/cuda/ptx.h"

using namespace qat::cuda;
using qat::emulation::Guarded;
using qat::emulation::machine;

namespace {

// Kernels that are wrong on purpose: the emulation must say so.
struct Broken {
  int kind;
};
void broken(const Broken p) {
  const bool odd = threadIdx.x % 2 != 0;
  if (p.kind == 0 && threadIdx.x < 40) __syncthreads();
  if (p.kind == 1) {
    if (odd) {
      shuffle_xor(1u, 1);
    } else {
      shuffle_xor(2u, 1);
    }
  }
  if (p.kind == 2 && threadIdx.x == 3) shared_memory()[16] = 0;
  if (p.kind == 3) copy_async(shared_memory(), shared_memory() + 8, true);
}

}  // namespace

extern "C" {

int run_broken(int64_t kind) { return launch(broken, {2}, 64, 16, nullptr, Broken{static_cast<int>(kind)}); }

Guarded* emulation_allocate(int64_t bytes, bool at_end) { return new Guarded(static_cast<std::size_t>(bytes), at_end); }
void* emulation_data(const Guarded* memory) { return memory->get(); }
void emulation_free(const Guarded* memory) { delete memory; }

void emulation_order(uint64_t order) { machine.order = order; }
void emulation_skip(const char* file, unsigned line) {
  machine.skip_file = file;
  machine.skip = line;
}
const char* emulation_failure() { return machine.failure.c_str(); }
const char* emulation_sites() {
  static std::string text;
  text.clear();
  for (const std::string& site : machine.sites) text += site + "\n";
  machine.sites.clear();
  return text.c_str();
}

int run_quantize_activation(const QuantizeActivation* p) { return quantize_activation(*p, nullptr); }
int run_quantize_weight(const QuantizeWeight* p) { return quantize_weight(*p, nullptr); }
int run_pack(const int8_t* t, int64_t n, int64_t k, int64_t layout, uint8_t* packed, uint64_t* bad) {
  return pack(t, n, k, static_cast<Layout>(layout), packed, bad, nullptr);
}
int run_unpack(const uint8_t* packed, int64_t n, int64_t k, int64_t layout, int8_t* t, uint64_t* bad) {
  return unpack(packed, n, k, static_cast<Layout>(layout), t, bad, nullptr);
}
int run_repack(const uint8_t* base3, int64_t n, int64_t k, uint8_t* bits, uint64_t* bad) {
  return repack(base3, n, k, bits, bad, nullptr);
}

int run_linear(const Linear* p) { return linear(*p, nullptr); }
// Tiles in the order of the enum, and one more for Hopper.
constexpr int64_t kHopper = 3;
int run_gemm(const Linear* p, int64_t tile) {
  if (tile == kHopper) return hopper_serves(*p) ? hopper_gemm(*p, nullptr) : 1;
  return gemm(*p, static_cast<Tile>(tile), nullptr);
}
int run_packed_linear(const PackedLinear* p) { return packed_linear(*p, nullptr); }
bool run_packed_linear_fused(const PackedLinear* p) { return packed_linear_fused(*p); }
// The path of many tokens, whatever their number.
int run_packed_gemm(const PackedLinear* p, int64_t tile) {
  if (const int error = quantize_interleaved(*p, nullptr)) return error;
  if (tile == kHopper) return hopper_serves(*p) ? hopper_packed_gemm(*p, nullptr) : 1;
  return packed_gemm(*p, static_cast<Tile>(tile), nullptr);
}
}
