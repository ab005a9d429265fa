// Runs CUDA kernels on the CPU, to prove indices and barriers without a GPU: the same .cu files, compiled by a C++20
// compiler with QAT_EMULATE. One fiber a thread; a thread runs until it meets others (barrier, shuffle, mma), so whatever
// is not ordered by a barrier happens in one of the extreme orders that `order` selects, and the results are compared.
//
// What it makes fail:
//     a missing __syncthreads or __syncwarp     shared memory starts poisoned, and one thread or warp runs far ahead
//     a missing wait for an asynchronous copy   its bytes arrive at the wait and never before; until then they are poison
//     a buffer refilled too early               issuing a copy poisons its destination at once
//     a read before the previous kernel ended   of programmatic launches, see overlap.h
//     a copy that no fence makes a product's    bytes that copies wrote are none of a product's until fence and barrier
//     a divergent barrier or shuffle            reported with source line and thread, as is a deadlock
//     an access outside of memory               buffers and shared memory end (or begin) at a page that cannot be touched
// `skip` disables one barrier or wait by its source line, so a test can remove each in turn and see the failure. With `dry`
// nothing runs, and it is only known which kernels were launched. counters.h counts sectors and bank conflicts.
//
// Legend: a block's threads are numbered 0.., in warps of 32.
#pragma once
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "counters.h"
#include "fiber.h"
#include "guarded.h"
#include "overlap.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline dim3 threadIdx, blockIdx, gridDim;

namespace qat::emulation {

// All state of the emulation; one launch at a time.
struct Machine {
  std::vector<Fiber> fibers;  // reused from block to block
  unsigned threads = 0, current = 0;
  jmp_buf scheduler;
  std::unique_ptr<Guarded> shared;
  std::vector<Seen> seen;            // by products, of each 16 bytes of shared memory
  std::vector<std::size_t> fenced;   // those whose barrier is to come
  Overlap overlap;
  Counters counters;
  void (*call)(void*) = nullptr;
  void* arguments = nullptr;
  std::string failure;
  uint64_t order = 0, random = 1;
  unsigned skip = 0;            // line, and
  std::string skip_file;        // file of the barriers that do nothing
  std::set<std::string> sites;  // every barrier and wait that was reached, as file:line
  uint32_t reciprocal_error = 0;  // units that reciprocal_near is off by
  bool dry = false;             // launches run nothing, and
  std::set<const void*> launched;  // are kept by their kernels
};
inline Machine machine;

inline std::string name(const std::source_location& at) {
  const std::string path = at.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(at.line());
}

// Back to the scheduler; noinline, as nothing may live in registers across it.
__attribute__((noinline)) inline void leave(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  if (_setjmp(fiber.here) == 0) _longjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& what, const std::source_location& at) {
  machine.failure = what + " at " + name(at) + ", thread " + std::to_string(machine.current) + ", block " +
                    std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y);
  _longjmp(machine.scheduler, 2);
}

// Whether a barrier or wait is in force.
inline bool in_force(const std::source_location& at) {
  if (machine.sites.size() < 4096) machine.sites.insert(name(at));
  return machine.skip == 0 || at.line() != machine.skip || name(at) != machine.skip_file + ":" + std::to_string(machine.skip);
}

// All threads of a warp (or of WIDTH, a warpgroup) meet; the last one runs `act` on what they bring.
template <unsigned WIDTH = kWarp, class Slot, class Act>
void meet(Slot& slot, Act act, const std::source_location& at) {
  const unsigned first = machine.current / WIDTH * WIDTH;
  Fiber& self = machine.fibers[machine.current];
  self.slot = &slot;
  self.at = at;
  self.state = State::warp;
  unsigned arrived = 0;
  for (unsigned i = 0; i < WIDTH; ++i) arrived += machine.fibers[first + i].state == State::warp;
  if (arrived < WIDTH) return leave(State::warp);
  Slot* slots[WIDTH];
  for (unsigned i = 0; i < WIDTH; ++i) {
    Fiber& other = machine.fibers[first + i];
    if (other.at.line() != at.line() || std::strcmp(other.at.file_name(), at.file_name()) != 0)
      fail("a divergent warp: another lane is at " + name(other.at), at);
    slots[i] = static_cast<Slot*>(other.slot);
    other.state = State::ready;
  }
  act(slots);
}

inline unsigned next_random() {
  machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>(machine.random >> 33);
}

// Which ready thread runs next: always the first, always the last, or any.
inline int pick() {
  const auto ready = [](unsigned i) { return machine.fibers[i].state == State::ready; };
  const unsigned n = machine.threads, start = machine.order < 2 ? 0 : next_random() % n;
  for (unsigned i = 0; i < n; ++i) {
    const unsigned candidate = machine.order == 1 ? n - 1 - i : (start + i) % n;
    if (ready(candidate)) return static_cast<int>(candidate);
  }
  return -1;
}

inline void trampoline() {
  machine.call(machine.arguments);
  machine.fibers[machine.current].state = State::done;
  _longjmp(machine.scheduler, 1);
}

__attribute__((noinline)) inline void resume(unsigned index) {
  Fiber& fiber = machine.fibers[index];
  machine.current = index;
  machine.overlap.show(fiber.waited);
  threadIdx.x = index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (!fiber.fresh) _longjmp(fiber.here, 1);
  fiber.fresh = false;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, trampoline, 0);
  setcontext(&fiber.start);
}

// Nobody can run: all are done, all wait at the block's barrier, or it is a deadlock.
inline bool release() {
  unsigned done = 0, waiting = 0;
  for (unsigned i = 0; i < machine.threads; ++i) {
    done += machine.fibers[i].state == State::done;
    waiting += machine.fibers[i].state == State::block;
  }
  if (done == machine.threads) return false;
  if (waiting != machine.threads) {
    for (unsigned i = 0; i < machine.threads; ++i)
      if (machine.fibers[i].state != State::done)
        throw std::runtime_error("deadlock: thread " + std::to_string(i) + " waits at " + name(machine.fibers[i].at) +
                                 " for threads that have ended or wait elsewhere");
  }
  for (unsigned i = 0; i < machine.threads; ++i) machine.fibers[i].state = State::ready;
  for (const std::size_t place : machine.fenced)
    if (machine.seen[place] == Seen::fenced) machine.seen[place] = Seen::yes;
  machine.fenced.clear();
  return true;
}

inline void run_block(std::size_t shared_bytes) {
  machine.shared = std::make_unique<Guarded>((shared_bytes + 15) / 16 * 16, true);
  machine.seen.assign((shared_bytes + 15) / 16, Seen::yes);
  machine.fenced.clear();
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.state = State::ready;
    fiber.fresh = true;
    fiber.waited = !machine.overlap.early;
    fiber.landed.clear();
    fiber.issued.clear();
    fiber.groups.clear();
    fiber.products.clear();
    fiber.product_groups.clear();
  }
  do {
    for (int next; (next = pick()) >= 0;) {
      resume(static_cast<unsigned>(next));
      if (!machine.failure.empty()) throw std::runtime_error(machine.failure);
    }
  } while (release());
  machine.counters.settle();
}

inline void run_grid(dim3 grid, unsigned threads, std::size_t shared_bytes) {
  if (threads == 0 || threads % kWarp || threads > 1024)
    throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
  machine.threads = threads;
  if (machine.fibers.size() < threads) machine.fibers.resize(threads);
  machine.random = machine.order * 2 + 1;
  gridDim = grid;
  const FaultHandler handler;
  if (sigsetjmp(escape, 1) != 0)
    throw std::runtime_error("an access outside of memory by thread " + std::to_string(machine.current) + ", block " +
                             std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y));
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = machine.order == 1 ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared_bytes);
  }
}

// `early`: the kernel may start before the one launched ahead of it has ended.
template <class P>
int launch(void (*kernel)(P), dim3 grid, unsigned threads, std::size_t shared_bytes, const P& parameters, bool early = false) {
  if (machine.dry) {
    machine.launched.insert(reinterpret_cast<const void*>(kernel));
    return 0;
  }
  struct Call {
    void (*kernel)(P);
    const P* parameters;
  } call = {kernel, &parameters};
  machine.arguments = &call;
  machine.call = [](void* opaque) {
    const auto* c = static_cast<Call*>(opaque);
    c->kernel(*c->parameters);
  };
  machine.failure.clear();
  machine.overlap.begin(early);
  try {
    run_grid(grid, threads, shared_bytes);
  } catch (const std::exception& error) {
    machine.failure = error.what();
  }
  machine.overlap.end();
  return machine.failure.empty() ? 0 : 999;  // cudaErrorUnknown
}

}  // namespace qat::emulation

inline void __syncthreads(const std::source_location at = std::source_location::current()) {
  using namespace qat::emulation;
  if (!in_force(at)) return;
  machine.fibers[machine.current].at = at;
  leave(State::block);
}

inline void __syncwarp(const std::source_location at = std::source_location::current()) {
  using namespace qat::emulation;
  char nothing = 0;
  if (in_force(at)) meet(nothing, [](char**) {}, at);
}
