// NEON with dot products (Armv8.2 and later: Apple M1, Neoverse N1, Cortex-A76). sdot multiplies 16 signed bytes and adds
// them by fours; the codes 0, 1, 2 are as good signed as unsigned. One load of 16 activations ("words") serves a whole
// block, since sdot takes the four bytes of position p from lane p of it.
#if defined(__aarch64__)
#include <arm_neon.h>

#define QAT_TARGET __attribute__((unused, target("arch=armv8.2-a+dotprod")))
#define QAT_VECTOR 16
#include "nearest.h"

namespace qat {
namespace {

constexpr int kTokens = 4;  // 4 tokens x 4 vectors = 16 accumulators of 32 registers
constexpr int kVectors = 4;  // of 4 output rows

template <int TOKENS>
QAT_TARGET inline void add_position(int32x4_t (&acc)[TOKENS][kVectors], const uint32x4_t (&bytes)[kVectors],
                                    const int8x16_t (&x)[TOKENS], int p) {
  const uint8x16_t mask = vdupq_n_u8(3);
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const uint8x16_t shifted = vreinterpretq_u8_u32(vshlq_u32(bytes[j], vdupq_n_s32(-2 * p)));
    const int8x16_t codes = vreinterpretq_s8_u8(vandq_u8(shifted, mask));
#pragma GCC unroll 4
    for (int m = 0; m < TOKENS; ++m) {
      switch (p) {  // the lane is part of the instruction
        case 0: acc[m][j] = vdotq_laneq_s32(acc[m][j], codes, x[m], 0); break;
        case 1: acc[m][j] = vdotq_laneq_s32(acc[m][j], codes, x[m], 1); break;
        case 2: acc[m][j] = vdotq_laneq_s32(acc[m][j], codes, x[m], 2); break;
        default: acc[m][j] = vdotq_laneq_s32(acc[m][j], codes, x[m], 3); break;
      }
    }
  }
}

// 16 output rows by TOKENS tokens.
template <int TOKENS>
QAT_TARGET void dot_rows(const uint32_t* tiles, const int8_t* words, int64_t stride, int64_t blocks, int32_t* out) {
  int32x4_t acc[TOKENS][kVectors];
#pragma GCC unroll 4
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[m][j] = vdupq_n_s32(0);
  for (int64_t block = 0; block < blocks; ++block, tiles += kPanel, words += kBlock) {
    uint32x4_t bytes[kVectors];
    int8x16_t x[TOKENS];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) bytes[j] = vld1q_u32(tiles + 4 * j);
#pragma GCC unroll 4
    for (int m = 0; m < TOKENS; ++m) x[m] = vld1q_s8(words + m * stride);
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) add_position<TOKENS>(acc, bytes, x, p);
  }
#pragma GCC unroll 4
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) vst1q_s32(out + m * kPanel + 4 * j, acc[m][j]);
}

QAT_TARGET void dot(const uint32_t* tiles, const int8_t* words, int64_t stride, int64_t blocks, int tokens, int32_t* acc) {
  for (int64_t row = 0; row < kPanel; row += 16) {
    if (tokens == 1) dot_rows<1>(tiles + row, words, stride, blocks, acc + row);
    if (tokens == 2) dot_rows<2>(tiles + row, words, stride, blocks, acc + row);
    if (tokens == 3) dot_rows<3>(tiles + row, words, stride, blocks, acc + row);
    if (tokens == 4) dot_rows<4>(tiles + row, words, stride, blocks, acc + row);
  }
}

}  // namespace

constexpr Isa neon = with_nearest(softened(path("neon", kTokens, dot)));

}  // namespace qat
#endif
