// cuda/ptx.h in plain C++: what each instruction does, told to the machine where threads must meet or wait.
#pragma once
#include <cmath>

#include "machine.h"

#define QAT_AT , const std::source_location at = std::source_location::current()
#define QAT_AT_ONLY const std::source_location at = std::source_location::current()

namespace qat::cuda {

// ---- arithmetic: one rounding each, never contracted to a fused multiply-add

inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float reciprocal(float a) { return 1.0f / a; }
inline float reciprocal_near(float a) { return bits_to_float(float_to_bits(1.0f / a) + emulation::machine.reciprocal_error); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float square_root(float a) { return std::sqrt(a); }
inline float max_nan(float a, float b) { return a != a || b != b ? std::bit_cast<float>(0x7fffffffu) : a > b ? a : b; }
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

// ---- memory

// Counts what the running thread asks for.
inline void count(emulation::Memory memory, const void* address, unsigned bytes, const std::source_location& at) {
  using emulation::machine;
  machine.counters.note(memory, at, machine.current, reinterpret_cast<uintptr_t>(address), bytes);
}
template <class T>
T load_shared(const void* from QAT_AT) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) emulation::fail("a misaligned load", at);
  count(emulation::Memory::shared, from, sizeof(T), at);
  T out;
  std::memcpy(&out, from, sizeof(T));
  return out;
}
template <class T>
void store_shared(void* to, T value QAT_AT) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) emulation::fail("a misaligned store", at);
  count(emulation::Memory::shared, to, sizeof(T), at);
  std::memcpy(to, &value, sizeof(T));
}
inline uint4 load_streaming(const void* from QAT_AT) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("a misaligned load", at);
  count(emulation::Memory::global, from, 16, at);
  uint4 out;
  std::memcpy(&out, from, 16);
  return out;
}
inline uint4 load_fresh(const void* from QAT_AT) { return load_streaming(from, at); }
inline float load_fresh_float(const float* from) { return *from; }
// The bytes come at wait_copies; until then they are poison, for those who still read what was there before, too.
inline void copy_async(void* shared, const void* global, bool valid QAT_AT) {
  using namespace emulation;
  if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) % 16)
    fail("a misaligned copy", at);
  count(Memory::shared, shared, 16, at);
  if (valid) count(Memory::global, global, 16, at);
  std::memset(shared, kPoison, 16);
  Fiber& fiber = machine.fibers[machine.current];
  Copy copy = {shared, global, 16, valid ? 16u : 0u, !fiber.waited, {}};
  if (copy.early && valid) std::memcpy(copy.seen, global, 16);
  fiber.issued.push_back(copy);
}
inline void copy_async_bytes(void* shared, const void* global, int bytes QAT_AT) { copy_async(shared, global, bytes != 0, at); }
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
      std::memcpy(copy.to, copy.early ? copy.seen : copy.from, copy.valid);
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
      const auto place = static_cast<std::size_t>(static_cast<char*>(copy.to) - static_cast<char*>(machine.shared->get())) / 16;
      machine.seen[place] = Seen::unfenced;
      machine.fibers[machine.current].landed.push_back(place);
    }
    groups.erase(groups.begin());
  }
}
inline void prefetch(const void*) {}
inline void wait_for_previous(QAT_AT_ONLY) {
  using namespace emulation;
  if (machine.fibers[machine.current].waited || !in_force(at)) return;  // no site where nothing is waited for
  machine.fibers[machine.current].waited = true;
  machine.overlap.show(true);
}
inline void let_next_start() {}
inline void atomic_max(uint32_t* to, uint32_t value) { *to = std::max(*to, value); }
inline void atomic_add(int32_t* to, int32_t value) { *to += value; }
inline void atomic_min(uint64_t* to, uint64_t value) { *to = std::min(*to, value); }

// ---- what the lanes of a warp do together

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
  count(emulation::Memory::shared, row, 16, at);
  const auto act = [](Slot** slots) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < kWarp; ++lane)
        std::memcpy(&slots[lane]->out[matrix], slots[matrix * 8 + lane / 4]->row + lane % 4 * 4, 4);
  };
  emulation::meet(slot, act, at);
  std::memcpy(out, slot.out, 16);
}
// A's bytes are of type T.
template <class T>
void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const std::source_location& at) {
  struct Slot {
    uint32_t a[4], b[2];
    int32_t c[4];
  } slot = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  const auto act = [](Slot** slots) {
    T a_16x32[16][32];
    int8_t b_8x32[8][32];
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
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] QAT_AT) { mma<int8_t>(c, a, b, at); }
inline void mma_u8s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] QAT_AT) { mma<uint8_t>(c, a, b, at); }
inline int32_t add_bytes(uint32_t a, int32_t c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i & 255);
  return c;
}

// ---- conversions

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

}  // namespace qat::cuda
