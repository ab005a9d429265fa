// What a launch asks of memory, counted where it is asked to: sectors of 32 bytes that the lanes of a warp read together from global
// memory, and wavefronts of shared memory, which is 32 banks of 4 bytes. Lanes meet at the n-th time that each comes to a line.
// Counted are the accesses by functions of ptx.h (copies, load_streaming, load_fresh, load_matrices, load_shared, store_shared).
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <source_location>
#include <string>
#include <tuple>
#include <vector>

namespace qat::emulation {

enum class Memory { global, shared };

class Counters {
 public:
  bool on = false;

  void note(Memory memory, const std::source_location& at, unsigned thread, uintptr_t address, unsigned bytes) {
    if (!on) return;
    const Site site = {memory, at.file_name(), at.line()};
    const unsigned turn = turns_[{site, thread}]++;
    pending_[{site, thread / kLanes, turn}].push_back({thread % kLanes, address, bytes});
  }

  // Of a block: its threads will not come together with another's.
  void settle() {
    for (const auto& [key, accesses] : pending_) {
      Sum& sum = sums_[std::get<0>(key)];
      (std::get<0>(key).memory == Memory::global ? sectors : wavefronts)(accesses, sum);
    }
    pending_.clear();
    turns_.clear();
  }

  // A line each: memory, file:line, what was met, and the least that so many bytes take. Counts begin anew.
  std::string text() {
    std::string out;
    for (const auto& [site, sum] : sums_) {
      const std::string path = site.file;
      out += std::string(site.memory == Memory::global ? "global " : "shared ") + path.substr(path.rfind('/') + 1) + ":" +
             std::to_string(site.line) + " " + std::to_string(sum.met) + " " + std::to_string(sum.least) + "\n";
    }
    sums_.clear();
    return out;
  }

 private:
  static constexpr unsigned kLanes = 32, kSector = 32, kBank = 4;

  struct Site {
    Memory memory;
    const char* file;
    unsigned line;
    auto operator<=>(const Site&) const = default;
  };
  struct Access {
    unsigned lane;
    uintptr_t address;
    unsigned bytes;
  };
  struct Sum {
    uint64_t met = 0, least = 0;
  };

  static void sectors(const std::vector<Access>& accesses, Sum& sum) {
    std::set<uintptr_t> met;
    uint64_t bytes = 0;
    for (const Access& one : accesses) {
      for (uintptr_t at = one.address / kSector; at <= (one.address + one.bytes - 1) / kSector; ++at) met.insert(at);
      bytes += one.bytes;
    }
    sum.met += met.size();
    sum.least += (bytes + kSector - 1) / kSector;
  }

  // Lanes take turns so that 128 bytes are asked for at once; a bank gives one of its words to all who want it.
  static void wavefronts(const std::vector<Access>& accesses, Sum& sum) {
    std::map<unsigned, std::array<std::set<uintptr_t>, kLanes>> phases;
    for (const Access& one : accesses)
      for (unsigned i = 0; i < one.bytes; i += kBank) {
        const uintptr_t word = (one.address + i) / kBank;
        phases[one.lane * std::max(one.bytes, kBank) / (kLanes * kBank)][word % kLanes].insert(word);
      }
    for (const auto& [phase, banks] : phases) {
      std::size_t most = 0;
      for (const auto& words : banks) most = std::max(most, words.size());
      sum.met += most;
      sum.least += 1;
    }
  }

  std::map<std::tuple<Site, unsigned>, unsigned> turns_;
  std::map<std::tuple<Site, unsigned, unsigned>, std::vector<Access>> pending_;
  std::map<Site, Sum> sums_;
};

}  // namespace qat::emulation
