// How work is shared among threads that belong to someone else (torch, in ops_cpu.h), and the scratch memory it needs.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

namespace qat {

constexpr int64_t kGrain = 1 << 16;  // multiplications or bytes below which a second thread does not pay

inline int64_t grain(int64_t cost_of_one) { return kGrain / (cost_of_one > 0 ? cost_of_one : 1) + 1; }

struct Threads {
  int64_t count;
  // Calls work(self, i) once for each i in [0, parts), on up to that many threads, and returns when all have ended.
  void (*each)(int64_t parts, void (*work)(const void* self, int64_t part), const void* self);
};

// Runs work(begin, end) over [0, items). Threads take small parts from a common counter, so that one that wakes late or
// shares its core with another program delays nobody; an equal split waits for the slowest.
template <class Work>
void share(const Threads& threads, int64_t items, int64_t least, const Work& work) {
  const int64_t most = (items + least - 1) / least;
  const int64_t workers = threads.count < most ? threads.count : most;
  if (workers <= 1) return work(0, items);
  const int64_t step = items / (workers * 8) > 0 ? items / (workers * 8) : 1;
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    for (int64_t begin = next.fetch_add(step); begin < items; begin = next.fetch_add(step))
      work(begin, begin + step < items ? begin + step : items);
  };
  threads.each(workers, [](const void* self, int64_t) { (*static_cast<decltype(&take)>(self))(); }, &take);
}

// Uninitialized scratch memory, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (static_cast<std::size_t>(count) * sizeof(T) / 64 + 1) * 64)), std::free) {
    if (data_ == nullptr) throw std::runtime_error("out of memory for " + std::to_string(count) + " scratch elements");
  }
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T, void (*)(void*)> data_;
};

}  // namespace qat
