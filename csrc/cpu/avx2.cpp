// AVX2 (Haswell, Zen and later): vpmaddubsw multiplies unsigned codes with signed activations and adds pairs in int16.
// A block adds at most 4 * 2 * 2 * 128 = 2048 to a lane, so 15 blocks fit before widening to int32.
#if defined(__x86_64__)
#include <immintrin.h>

#define QAT_TARGET __attribute__((unused, target("avx2,f16c")))
#define QAT_VECTOR 32
#include "nearest.h"

namespace qat {
namespace {

constexpr int kTokens = 3;  // 3 tokens x 2 vectors x (int16 + int32) = 12 accumulators of 16 registers
constexpr int64_t kWiden = 15;

QAT_TARGET inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

QAT_TARGET inline __m256i broadcast(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return _mm256_set1_epi32(word);
}

QAT_TARGET void to_float8(const void* x, Dtype dtype, int64_t n, float* out) {
  const auto* in = static_cast<const uint16_t*>(x);
  int64_t i = 0;
  if (dtype == Dtype::f16)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  to_float(static_cast<const char*>(x) + i * 2, dtype, n - i, out + i);
}

QAT_TARGET void from_float8(const float* x, int64_t n, Dtype dtype, void* y) {
  auto* out = static_cast<uint16_t*>(y);
  int64_t i = 0;
  if (dtype == Dtype::f16)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  from_float(x + i, n - i, dtype, static_cast<char*>(y) + i * 2);
}

QAT_TARGET void quantize8(const float* x, const Segments& s, float inverse, int8_t* words, int32_t* sums, int8_t* codes) {
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t g = 0; g < s.count; ++g, x += s.length, words += s.padded, codes += codes ? s.length : 0) {
    __m256i sum = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 16 <= s.length; i += 16) {
      const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor));
      const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), factor));
      const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
      const __m128i code = _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(code), _mm256_set1_epi16(1)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(words + i), _mm_shuffle_epi8(code, order));
      if (codes) _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), code);
    }
    alignas(32) int32_t parts[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
    std::memset(words + i, 0, static_cast<size_t>(s.padded - i));
    sums[g] = quantize_rest(x, i, s.length, inverse, words, codes);
    for (int32_t part : parts) sums[g] += part;
  }
}

// 16 output rows (two vectors) by TOKENS tokens.
template <int TOKENS>
QAT_TARGET void dot_rows(const uint32_t* tiles, const int8_t* words, int64_t stride, int64_t blocks, int32_t* out) {
  const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  __m256i total[TOKENS][2];
#pragma GCC unroll 4
  for (int m = 0; m < TOKENS; ++m) total[m][0] = total[m][1] = _mm256_setzero_si256();
  for (int64_t block = 0; block < blocks;) {
    __m256i sum[TOKENS][2];
#pragma GCC unroll 4
    for (int m = 0; m < TOKENS; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
    const int64_t stop = block + kWiden < blocks ? block + kWiden : blocks;
    for (; block < stop; ++block, tiles += kPanel, words += kBlock) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const __m256i low = _mm256_and_si256(_mm256_srli_epi32(load(tiles), 2 * p), mask);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi32(load(tiles + 8), 2 * p), mask);
#pragma GCC unroll 4
        for (int m = 0; m < TOKENS; ++m) {
          const __m256i x = broadcast(words + m * stride + 4 * p);
          sum[m][0] = _mm256_add_epi16(sum[m][0], _mm256_maddubs_epi16(low, x));
          sum[m][1] = _mm256_add_epi16(sum[m][1], _mm256_maddubs_epi16(high, x));
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) total[m][h] = _mm256_add_epi32(total[m][h], _mm256_madd_epi16(sum[m][h], ones));
  }
#pragma GCC unroll 4
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + m * kPanel + 8 * h), total[m][h]);
}

QAT_TARGET void dot(const uint32_t* tiles, const int8_t* words, int64_t stride, int64_t blocks, int tokens, int32_t* acc) {
  for (int64_t row = 0; row < kPanel; row += 16) {
    if (tokens == 1) dot_rows<1>(tiles + row, words, stride, blocks, acc + row);
    if (tokens == 2) dot_rows<2>(tiles + row, words, stride, blocks, acc + row);
    if (tokens == 3) dot_rows<3>(tiles + row, words, stride, blocks, acc + row);
  }
}

constexpr Isa with_avx2() {
  Isa isa = with_nearest(softened(path("avx2", kTokens, dot)));
  isa.to_float = to_float8;
  isa.from_float = from_float8;
  isa.quantize = quantize8;
  return isa;
}

}  // namespace

constexpr Isa avx2 = with_avx2();

}  // namespace qat
#endif
