// Memory for the emulation in which a wrong access is a fault, and a fault ends the launch instead of the process.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>

namespace qat::emulation {

constexpr int kPoison = 0xA5;

// Memory that ends, or begins, at a page that cannot be touched.
class Guarded {
 public:
  Guarded(std::size_t bytes, bool at_end) : bytes_(bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t inside = (bytes + page - 1) / page * page;
    length_ = inside + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    if (inside) mprotect(base_ + page, inside, PROT_READ | PROT_WRITE);
    data_ = base_ + page + (at_end ? inside - bytes : 0);
    std::memset(data_, kPoison, bytes);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, length_); }
  void* get() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  char *base_, *data_;
  std::size_t length_, bytes_;
};

inline sigjmp_buf escape;  // where a fault ends
inline void on_fault(int) { siglongjmp(escape, 1); }

class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action = {};
    action.sa_handler = on_fault;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }

 private:
  struct sigaction segv_, bus_;
};

}  // namespace qat::emulation
