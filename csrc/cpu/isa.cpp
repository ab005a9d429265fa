// Which paths this machine has, and which one is in use.
#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace qat {
namespace {

#if defined(__x86_64__)
const Isa* const kPaths[] = {&portable, &avx2, &avx512};
#elif defined(__aarch64__)
const Isa* const kPaths[] = {&portable, &neon};
#else
const Isa* const kPaths[] = {&portable};
#endif

const Isa* taken = nullptr;

}  // namespace

const Isa& isa_at(int index) { return *kPaths[index]; }

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
#if defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return 1;
#elif defined(__aarch64__) && defined(__APPLE__)
  return 1;  // every Apple machine with an Arm CPU has it
#endif
  return 0;
}

const Isa& isa() {
  if (!taken) taken = &isa_at(best_isa());
  return *taken;
}

void take_isa(int index) { taken = &isa_at(index); }

}  // namespace qat
