// A thread of the emulation: where it stands, and the copies and products that it has under way.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <vector>

namespace qat::emulation {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 128 << 10;

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, valid;       // the rest of the bytes becomes 0
  bool early = false;          // issued before the previous kernel had ended, with
  unsigned char seen[16] = {}; // what could be read then
};

// A thread's part of an asynchronous matrix product (wgmma.h): its accumulators, its fragment of A, and where B lies.
struct Product {
  int32_t (*acc)[4];
  uint32_t a[4];
  std::size_t b;  // offset in shared memory
};

enum class State { ready, block, warp, done };
enum class Seen : uint8_t { yes, unfenced, fenced };  // fenced: but behind no barrier yet

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  bool fresh = true;
  std::source_location at;                // where it waits
  void* slot = nullptr;                   // what it brings to a meeting of its warp
  std::vector<Copy> issued;               // asynchronous copies not yet in a group
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  bool waited = true;                     // for the previous kernel
  std::vector<std::size_t> landed;        // 16 bytes of shared memory that its copies wrote since its last fence
  std::vector<Product> products;          // asynchronous products not yet in a group
  std::vector<std::vector<Product>> product_groups;
};

}  // namespace qat::emulation
