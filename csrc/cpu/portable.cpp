// The path for any CPU: plain C++, which the compiler may vectorize for its baseline.
#define QAT_TARGET __attribute__((unused))
#define QAT_VECTOR 16
#include "nearest.h"

namespace qat {
namespace {

void dot(const uint32_t* tiles, const int8_t* words, int64_t stride, int64_t blocks, int tokens, int32_t* acc) {
  std::memset(acc, 0, static_cast<size_t>(tokens) * kPanel * 4);
  for (int64_t block = 0; block < blocks; ++block, tiles += kPanel, words += kBlock) {
    for (int token = 0; token < tokens; ++token) {
      const int8_t* x = words + token * stride;
      int32_t* out = acc + token * kPanel;
      for (int i = 0; i < kBlock; ++i) {  // i = 4 p + b
        const int shift = 8 * (i & 3) + 2 * (i >> 2);
        const int32_t value = x[i];
        for (int64_t lane = 0; lane < kPanel; ++lane) out[lane] += static_cast<int32_t>(tiles[lane] >> shift & 3) * value;
      }
    }
  }
}

}  // namespace

constexpr Isa portable = with_nearest(softened(path("portable", kMaxTokens, dot)));

}  // namespace qat
