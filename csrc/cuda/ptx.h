// Every instruction that C++ has no word for, one small function each: PTX on the device, plain C++ in the emulation.
#pragma once
#include "platform.h"

#if defined(QAT_EMULATE)
#include <cmath>
#define QAT_AT , const std::source_location at = std::source_location::current()
#define QAT_AT_ONLY const std::source_location at = std::source_location::current()
#else
#define QAT_AT
#define QAT_AT_ONLY
#endif

namespace qat::cuda {

// ---- arithmetic: one rounding each, never contracted to a fused multiply-add

#if defined(QAT_EMULATE)
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float reciprocal(float a) { return 1.0f / a; }
inline float square_root(float a) { return std::sqrt(a); }
inline float max_nan(float a, float b) { return a != a || b != b ? std::bit_cast<float>(0x7fffffffu) : a > b ? a : b; }
inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // the sign, replicated
    out |= byte << 8 * i;
  }
  return out;
}
#else
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float reciprocal(float a) { return __frcp_rn(a); }
__device__ __forceinline__ float square_root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ float max_nan(float a, float b) {  // keeps a NaN, as torch's amax does
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }
// Byte i of the result is byte (selector >> 4 i & 7) of b:a. Only the low 16 bits of the selector count.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}
#endif

// ---- memory

#if defined(QAT_EMULATE)
inline uint4 load_streaming(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("a misaligned load", std::source_location::current());
  uint4 out;
  std::memcpy(&out, from, 16);
  return out;
}
inline uint4 load_fresh(const void* from) { return load_streaming(from); }
inline float load_fresh_float(const float* from) { return *from; }
// The bytes come at wait_copies; until then they are poison, for those who still read what was there before, too.
inline void copy_async(void* shared, const void* global, bool valid QAT_AT) {
  using namespace emulation;
  if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) % 16)
    fail("a misaligned copy", at);
  std::memset(shared, kPoison, 16);
  machine.fibers[machine.current].issued.push_back({shared, global, 16, valid ? 16u : 0u});
}
inline void commit_copies() {
  auto& fiber = emulation::machine.fibers[emulation::machine.current];
  fiber.groups.push_back(std::move(fiber.issued));
  fiber.issued.clear();
}
template <int PENDING>
void wait_copies(QAT_AT_ONLY) {
  using namespace emulation;
  if (!in_force(at)) return;
  auto& groups = machine.fibers[machine.current].groups;
  while (groups.size() > PENDING) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
    groups.erase(groups.begin());
  }
}
inline void wait_for_previous() {}
inline void let_next_start() {}
inline void atomic_max(uint32_t* to, uint32_t value) { *to = std::max(*to, value); }
inline void atomic_add(int32_t* to, int32_t value) { *to += value; }
inline void atomic_min(uint64_t* to, uint64_t value) { *to = std::min(*to, value); }
#else
// 16 bytes that are read once: they leave no room taken in the L1 cache.
__device__ __forceinline__ uint4 load_streaming(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
// What the previous kernel wrote, for a kernel that may have started before that one ended: from the L2 cache.
__device__ __forceinline__ uint4 load_fresh(const void* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ float load_fresh_float(const float* from) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
  return v;
}
// 16 bytes from global to shared memory without passing through registers; zeros where not valid.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of the calling thread's latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Programmatic launch: until the previous kernel's writes can be read; and the next one may be launched.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void atomic_max(uint32_t* to, uint32_t value) { atomicMax(to, value); }
__device__ __forceinline__ void atomic_add(int32_t* to, int32_t value) { atomicAdd(to, value); }
__device__ __forceinline__ void atomic_min(uint64_t* to, uint64_t value) {
  atomicMin(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
#endif

// ---- what the lanes of a warp do together

#if defined(QAT_EMULATE)
template <class V>
V shuffle_xor(V value, unsigned mask QAT_AT) {
  struct Slot {
    V value;
    unsigned mask;
  } slot = {value, mask};
  const auto act = [](Slot** slots) {
    V values[emulation::kWarp];
    for (unsigned i = 0; i < emulation::kWarp; ++i) values[i] = slots[i]->value;
    for (unsigned i = 0; i < emulation::kWarp; ++i) slots[i]->value = values[i ^ slots[i]->mask];
  };
  emulation::meet(slot, act, at);
  return slot.value;
}
inline void load_matrices(uint32_t (&out)[4], const void* row QAT_AT) {
  struct Slot {
    const unsigned char* row;
    uint32_t out[4];
  } slot = {static_cast<const unsigned char*>(row), {}};
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("a misaligned matrix row", at);
  const auto act = [](Slot** slots) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < kWarp; ++lane)
        std::memcpy(&slots[lane]->out[matrix], slots[matrix * 8 + lane / 4]->row + lane % 4 * 4, 4);
  };
  emulation::meet(slot, act, at);
  std::memcpy(out, slot.out, 16);
}
// Fragments: a[0] rows g, k 4q..; a[1] rows g + 8; a[2], a[3] the same at k 16 + 4q..; b[0] column g, k 4q..; b[1] k 16 + 4q..;
// c[0], c[1] row g, columns 2q, 2q + 1; c[2], c[3] row g + 8; with g = lane / 4 and q = lane % 4.
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] QAT_AT) {
  struct Slot {
    uint32_t a[4], b[2];
    int32_t c[4];
  } slot = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  const auto act = [](Slot** slots) {
    int8_t a_16x32[16][32], b_8x32[8][32];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int half = 0; half < 2; ++half) {
        std::memcpy(&a_16x32[g][16 * half + 4 * q], &slots[lane]->a[2 * half], 4);
        std::memcpy(&a_16x32[g + 8][16 * half + 4 * q], &slots[lane]->a[2 * half + 1], 4);
        std::memcpy(&b_8x32[g][16 * half + 4 * q], &slots[lane]->b[half], 4);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        int32_t sum = 0;
        for (int k = 0; k < 32; ++k) sum += a_16x32[row][k] * b_8x32[column][k];
        slots[lane]->c[i] += sum;
      }
  };
  emulation::meet(slot, act, at);
  std::memcpy(c, slot.c, 16);
}
#else
template <class V>
__device__ __forceinline__ V shuffle_xor(V value, unsigned mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Four 8 x 16-byte matrices from shared memory: lane i gives row i % 8 of matrix i / 8, and takes bytes 4q..4q + 3 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}
// c [16, 8] += a [16, 32] . b [8, 32]^T on int8 tensor cores; fragments as in the emulation above.
__device__ __forceinline__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// ---- conversions

#if defined(QAT_EMULATE)
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float magnitude = rest >= 0x400u ? bits_to_float((rest << 13) + 0x38000000u) : static_cast<float>(rest) * 0x1p-24f;
  return bits_to_float(sign | float_to_bits(magnitude));
}
inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fff;
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13));
}
inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  return static_cast<uint16_t>(value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
#else
__device__ __forceinline__ float half_to_float(uint16_t h) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(h));
  return out;
}
__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}
__device__ __forceinline__ uint16_t float_to_bfloat(float value) {
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}
#endif

}  // namespace qat::cuda
