// Programmatic launches in the emulation: a kernel that may start early sees, up to its wait, none of what the kernel ahead of it
// wrote. Threads that have not waited run with those bytes poisoned, the others with what was written.
#pragma once
#include <cstring>
#include <vector>

#include "guarded.h"

namespace qat::emulation {

inline std::vector<const Guarded*> global_memory;  // what launches may write

class Overlap {
 public:
  bool early = false;

  void begin(bool may_start_early) {
    early = may_start_early && !written_.empty();
    if (!early) written_.clear();
    before_.clear();
    for (const Guarded* memory : global_memory) {
      const char* data = static_cast<const char*>(memory->get());
      before_.push_back({memory, {data, data + memory->bytes()}});
    }
    shown_ = true;
  }

  // Memory as a thread sees it that has waited, or has not.
  void show(bool waited) {
    if (!early || waited == shown_) return;
    shown_ = waited;
    for (Byte& byte : written_) {
      if (!waited) byte.value = *byte.at;  // which threads that have waited may have changed
      *byte.at = waited ? byte.value : static_cast<char>(kPoison);
    }
  }

  // What this launch wrote is what the next one may not see.
  void end() {
    show(true);
    written_.clear();
    early = false;
    for (const Before& one : before_) {
      char* data = static_cast<char*>(one.memory->get());
      for (std::size_t i = 0; i < one.bytes.size(); ++i)
        if (data[i] != one.bytes[i]) written_.push_back({data + i, data[i]});
    }
    before_.clear();
  }

  void forget() { written_.clear(); }  // memory is freed

 private:
  struct Byte {
    char *at, value;
  };
  struct Before {
    const Guarded* memory;
    std::vector<char> bytes;
  };
  bool shown_ = true;
  std::vector<Byte> written_;
  std::vector<Before> before_;
};

}  // namespace qat::emulation
