// The CUDA kernels on the CPU, for ctypes: memory with guard pages, the launchers, and the emulation's switches.
#include "../csrc/cuda/codes.h"
#include "../csrc/cuda/internal.h"
#include "../csrc/cuda/ptx.h"
#include "../csrc/cuda/wgmma.h"

using namespace qat::cuda;
using qat::emulation::Guarded;
using qat::emulation::machine;

namespace {

// Kernels that are wrong on purpose: the emulation must say so.
struct Broken {
  int kind;
  const void* from;
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
  if (p.kind < 4) return;
  // A product of copied bytes: 4 has a fence but no barrier behind it, 5 a barrier but no fence.
  int32_t acc[16][4] = {};
  copy_async(shared_memory(), p.from, true);
  commit_copies();
  wait_copies<0>();
  if (p.kind == 4) fence_copies();
  if (p.kind == 5) __syncthreads();
  product_s8(acc, {0, 0, 0, 0}, matrix_at(shared_memory()));
}

// A warp whose accesses are known, a line each.
void counted(const Broken p) {
  const auto* from = static_cast<const unsigned char*>(p.from);
  unsigned char* shared = shared_memory();
  const unsigned lane = threadIdx.x;
  load_streaming(from + lane * 16);
  load_streaming(from + lane * 32);
  load_streaming(from);
  store_shared(shared + lane * 4, lane);
  store_shared(shared + lane * 128, lane);
  store_shared(shared + lane / 16 * 128 + lane % 16 * 8, lane);
  load_shared<uint4>(shared + lane * 16);
  load_shared<uint4>(shared + lane * 32);
}

// A struct's line for tests/mirrors.py: its name and size, then each field's name, offset and size. Structured bindings do not
// compile unless they name every field.
std::string line(const std::string& name, std::size_t size, std::string names, const void* start,
                 std::initializer_list<std::pair<const void*, std::size_t>> fields) {
  std::string text = name + " " + std::to_string(size);
  std::erase(names, ' ');
  for (const auto& [address, bytes] : fields) {
    const auto offset = static_cast<const char*>(address) - static_cast<const char*>(start);
    text += " " + names.substr(0, names.find(',')) + ":" + std::to_string(offset) + ":" + std::to_string(bytes);
    names.erase(0, names.find(',') + 1);
  }
  return text + "\n";
}
template <class S, class... Fields>
std::string line_of(const char* name, const char* names, const S& whole, const Fields&... fields) {
  return line(name, sizeof(S), names, &whole, {{&fields, sizeof(fields)}...});
}
#define LAYOUT(STRUCT, ...)                                       \
  [] {                                                            \
    const STRUCT whole = {};                                      \
    const auto& [__VA_ARGS__] = whole;                            \
    return line_of(#STRUCT, #__VA_ARGS__, whole, __VA_ARGS__);    \
  }()

}  // namespace

extern "C" {

const char* emulation_layouts() {
  static const std::string text =
      LAYOUT(QuantizeActivation, x, dtype, m, k, per_tensor, eps, norm_weight, norm_eps, codes, divisor, scale, workspace) +
      LAYOUT(QuantizeWeight, w, dtype, n, k, groups, granularity, reduce, binary, scale_dtype, eps, t, packed, scale, workspace) +
      LAYOUT(Output, y, dtype, scale, scale_stride, bias) +
      LAYOUT(Linear, codes, divisor, t, m, n, k, groups, out, raw, partial) +
      LAYOUT(PackedLinear, x, per_tensor, eps, packed, m, n, k, groups, out, codes, divisor, workspace, partial, overlap);
  return text.c_str();
}

int run_broken(int64_t kind) {
  alignas(16) static const unsigned char bytes[16] = {};
  return launch(broken, {2}, kind < 4 ? 64 : kWarpgroup, kind < 4 ? 16 : 16384, nullptr, Broken{static_cast<int>(kind), bytes});
}

// a / b by divide_plain, its first reciprocal so many units off.
int run_divide_plain(const float* a, const float* b, int64_t count, int64_t units, float* out) {
  machine.reciprocal_error = static_cast<uint32_t>(units);
  for (int64_t i = 0; i < count; ++i) out[i] = divide_plain(a[i], b[i]);
  machine.reciprocal_error = 0;
  return 0;
}

int run_counted(const void* from) { return launch(counted, {1}, kWarp, 4096, nullptr, Broken{0, from}); }

Guarded* emulation_allocate(int64_t bytes, bool at_end) {
  auto* memory = new Guarded(static_cast<std::size_t>(bytes), at_end);
  qat::emulation::global_memory.push_back(memory);
  return memory;
}
void* emulation_data(const Guarded* memory) { return memory->get(); }
void emulation_free(const Guarded* memory) {
  std::erase(qat::emulation::global_memory, memory);
  machine.overlap.forget();
  delete memory;
}

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

void emulation_dry(bool dry) { machine.dry = dry; }
// Where the kernels that were launched begin, from the beginning of this function on.
const char* emulation_launched() {
  static std::string text;
  text.clear();
  for (const void* kernel : machine.launched)
    text += std::to_string(static_cast<const char*>(kernel) - reinterpret_cast<const char*>(&emulation_launched)) + "\n";
  machine.launched.clear();
  return text.c_str();
}

void emulation_count(bool on) { machine.counters.on = on; }
const char* emulation_counts() {
  static std::string text;
  text = machine.counters.text();
  return text.c_str();
}

int run_quantize_activation(const QuantizeActivation* p) { return quantize_activation(*p, nullptr); }
int run_quantize_weight(const QuantizeWeight* p) { return quantize_weight(*p, nullptr); }
int run_soften(const float* w, int64_t rows, int64_t length, const float* levels, const float* borders, int64_t m,
               const float* beta, int64_t dtype, void* soft, void* slope) {
  return soften_weight(w, rows, length, levels, borders, m, beta, static_cast<Dtype>(dtype), soft, slope, nullptr);
}
int run_dequantize(const void* codes, bool bits, int64_t n, int64_t k, int64_t groups, const float* scale, int64_t scale_stride,
                   int64_t dtype, void* out) {
  return dequantize(codes, bits, n, k, groups, scale, scale_stride, static_cast<Dtype>(dtype), out, nullptr);
}
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
int run_gemm(const Linear* p, int64_t tile, int64_t splits) {
  if (tile == kHopper) return hopper_serves(*p) ? hopper_gemm(*p, static_cast<int>(splits), nullptr) : 1;
  return gemm(*p, {static_cast<Tile>(tile), static_cast<int>(splits), 0}, nullptr);
}
// What the shape takes on a device of so many multiprocessors: the tile, and splits times 4.
int64_t run_plan(int64_t sms, int64_t m, int64_t n, int64_t k, int64_t groups, bool may_split) {
  const Plan plan = gemm_plan(static_cast<int>(sms), m, n, k, groups, may_split);
  return static_cast<int64_t>(plan.tile) + plan.splits * 4;
}
int64_t run_partial_bytes(const Linear* p) { return partial_bytes(*p); }
int64_t run_packed_partial_bytes(const PackedLinear* p) { return partial_bytes(*p); }
int run_packed_linear(const PackedLinear* p) { return packed_linear(*p, nullptr); }
bool run_packed_linear_fused(const PackedLinear* p) { return packed_linear_fused(*p); }
// The path of many tokens, whatever their number.
int run_packed_gemm(const PackedLinear* p, int64_t tile, int64_t splits) {
  if (const int error = quantize_interleaved(*p, Order::nibbles, nullptr)) return error;
  if (tile == kHopper) return hopper_serves(*p) ? hopper_packed_gemm(*p, static_cast<int>(splits), nullptr) : 1;
  return packed_gemm(*p, {static_cast<Tile>(tile), static_cast<int>(splits), 0}, nullptr);
}
}
