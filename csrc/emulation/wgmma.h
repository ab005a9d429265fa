// cuda/wgmma.h in plain C++. A product takes place at the wait for its group, with what shared memory holds then, and its
// results are not there before. It reads through another proxy than copies write: their bytes are there for it only after the
// writer's fence_copies and a barrier behind that.
#pragma once
#include "ptx.h"

namespace qat::cuda {

inline void fence_copies(QAT_AT_ONLY) {
  using namespace emulation;
  if (!in_force(at)) return;
  auto& landed = machine.fibers[machine.current].landed;
  for (const std::size_t place : landed) machine.seen[place] = Seen::fenced;
  machine.fenced.insert(machine.fenced.end(), landed.begin(), landed.end());
  landed.clear();
}
inline void fence_products() {}

using Matrix = std::size_t;  // bytes from the start of shared memory
inline Matrix matrix_at(const unsigned char* b) { return static_cast<std::size_t>(b - shared_memory()); }
inline Matrix moved(Matrix b, int bytes) { return b + static_cast<std::size_t>(bytes); }

inline void product_s8(int32_t (&acc)[16][4], const uint32_t (&a)[4], Matrix offset QAT_AT) {
  using namespace emulation;
  if (offset % 1024 >= kSwizzleRow || offset % 32) fail("a misplaced operand of a product", at);
  for (std::size_t row = 0; row < kWarpgroup; ++row)
    for (std::size_t i = offset + row * kSwizzleRow; i < offset + row * kSwizzleRow + 32; i += 16)
      if (machine.seen[(i ^ (i >> 7 & 7) << 4) / 16] != Seen::yes) fail("a product of bytes that are not fenced", at);
  machine.fibers[machine.current].products.push_back({acc, {a[0], a[1], a[2], a[3]}, offset});
}

inline void commit_products() {
  auto& fiber = emulation::machine.fibers[emulation::machine.current];
  fiber.product_groups.push_back(std::move(fiber.products));
  fiber.products.clear();
}

// All of a warpgroup's threads at one product.
inline void multiply_now(emulation::Product** parts) {
  int8_t a_64x32[64][32], b_128x32[128][32];
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const int row = thread / kWarp * 16 + thread % kWarp / 4, q = thread % 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&a_64x32[row + i % 2 * 8][i / 2 * 16 + q * 4], &parts[thread]->a[i], 4);
  }
  for (std::size_t row = 0; row < 128; ++row)
    for (std::size_t i = 0; i < 32; ++i) {
      std::size_t at = parts[0]->b + row * kSwizzleRow + i;
      at ^= (at >> 7 & 7) << 4;
      b_128x32[row][i] = static_cast<int8_t>(shared_memory()[at]);
    }
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int j = 0; j < 16; ++j)
      for (int e = 0; e < 4; ++e) {
        const int row = thread / kWarp * 16 + thread % kWarp / 4 + e / 2 * 8, column = j * 8 + thread % 4 * 2 + e % 2;
        int32_t sum = 0;
        for (int k = 0; k < 32; ++k) sum += a_64x32[row][k] * b_128x32[column][k];
        parts[thread]->acc[j][e] += sum;
      }
}

template <int PENDING>
void wait_products(QAT_AT_ONLY) {
  using namespace emulation;
  if (!in_force(at)) return;
  auto& groups = machine.fibers[machine.current].product_groups;
  while (groups.size() > PENDING) {
    for (Product& product : groups.front()) meet<kWarpgroup>(product, multiply_now, at);
    groups.erase(groups.begin());
  }
}

}  // namespace qat::cuda
