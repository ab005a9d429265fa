// AVX512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
//
// vpdpbusd multiplies unsigned codes with signed activations, 64 products an instruction. Two findings shape this file:
// gcc 12 spills the accumulators of _mm512_dpbusd_epi32, so that one instruction is inline assembly; and for one token
// the codes are masked where they stand in the byte (0x03, 0x0c, 0x30, 0xc0), each position in its own accumulator,
// which is divided by 4^p once at the end: four ANDs and no shifts for 64 bytes of weights.
#if defined(__x86_64__)
#include <immintrin.h>

#define QAT_TARGET __attribute__((unused, target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")))
#define QAT_VECTOR 64
#include "nearest.h"

namespace qat {
namespace {

using Lanes = __m512;

QAT_TARGET inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }

}  // namespace
}  // namespace qat

#include "attention.h"

namespace qat {
namespace {

constexpr int kVectors = kPanel / 16;
constexpr int kTokens = 6;  // 6 tokens x 4 vectors = 24 accumulators, and 4 weights, a mask and a broadcast: 30 registers

QAT_TARGET inline void dpbusd(__m512i& acc, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
}

QAT_TARGET inline __m512i broadcast(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}

QAT_TARGET inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }

// Hardware prefetching stops at every 4 KB page, and the arithmetic of one token leaves no slack to wait in. 8 KB ahead
// and, for base-3, no nearer than the L2 cache were the fastest of 1, 4, 8 and 16 KB in either level (Zen 4).
template <_mm_hint HINT>
QAT_TARGET inline void prefetch_block(const uint32_t* tiles) {
#pragma GCC unroll 4
  for (int line = 0; line < kVectors; ++line) _mm_prefetch(reinterpret_cast<const char*>(tiles) + 8192 + 64 * line, HINT);
}

QAT_TARGET void to_float16(const void* x, Dtype dtype, int64_t n, float* out) {
  const auto* in = static_cast<const uint16_t*>(x);
  if (dtype == Dtype::f32) return to_float(x, dtype, n, out);
  for (int64_t i = 0; i < n; i += 16) {
    const auto lanes = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m256i raw = _mm256_maskz_loadu_epi16(lanes, in + i);
    const __m512 wide =
        dtype == Dtype::f16 ? _mm512_cvtph_ps(raw) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    _mm512_mask_storeu_ps(out + i, lanes, wide);
  }
}

QAT_TARGET void from_float16(const float* x, int64_t n, Dtype dtype, void* y) {
  auto* out = static_cast<uint16_t*>(y);
  if (dtype != Dtype::f16) return from_float(x, n, dtype, y);
  for (int64_t i = 0; i < n; i += 16) {
    const auto lanes = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512 wide = _mm512_maskz_loadu_ps(lanes, x + i);
    _mm256_mask_storeu_epi16(out + i, lanes, _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

QAT_TARGET float absmax16(const float* x, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most[4];
  for (auto& m : most) m = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) most[j] = _mm512_max_epi32(most[j], _mm512_and_si512(magnitude, load(x + i + 16 * j)));
  for (; i < n; i += 16) {
    const auto lanes = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    most[0] = _mm512_max_epi32(most[0], _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi32(lanes, x + i)));
  }
  most[0] = _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]));
  return bits_to_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(most[0])));
}

QAT_TARGET void quantize16(const float* x, const Segments& s, float inverse, int8_t* words, int32_t* sums, int8_t* codes) {
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t g = 0; g < s.count; ++g, x += s.length, words += s.padded, codes += codes ? s.length : 0) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < s.padded; i += 16) {
      const int64_t left = s.length - i;
      const auto lanes = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
      const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), factor);
      const __m512i rounded = _mm512_maskz_cvt_roundps_epi32(lanes, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m128i code = _mm512_cvtsepi32_epi8(rounded);
      sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(code));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(words + i), _mm_shuffle_epi8(code, order));
      if (codes) _mm_mask_storeu_epi8(codes + i, lanes, code);
    }
    sums[g] = _mm512_reduce_add_epi32(sum);
  }
}

template <int TOKENS>
QAT_TARGET void dot_tokens(const uint32_t* tiles, const int8_t* words, int64_t stride, int64_t blocks, int32_t* out) {
  const __m512i mask = _mm512_set1_epi8(3);
  __m512i acc[TOKENS][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[m][j] = _mm512_setzero_si512();
  for (int64_t block = 0; block < blocks; ++block, tiles += kPanel, words += kBlock) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      __m512i codes[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) codes[j] = _mm512_and_si512(_mm512_srli_epi32(load(tiles + 16 * j), 2 * p), mask);
#pragma GCC unroll 8
      for (int m = 0; m < TOKENS; ++m) {
        const __m512i x = broadcast(words + m * stride + 4 * p);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) dpbusd(acc[m][j], codes[j], x);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_si512(out + m * kPanel + 16 * j, acc[m][j]);
}

// Four accumulators of every vector: that of position p carries a factor 4^p.
QAT_TARGET inline void clear_positions(__m512i (&acc)[kVectors][4]) {
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j)
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) acc[j][p] = _mm512_setzero_si512();
}

QAT_TARGET inline void store_positions(const __m512i (&acc)[kVectors][4], int32_t* out) {
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const __m512i low = _mm512_add_epi32(acc[j][0], _mm512_srai_epi32(acc[j][1], 2));
    const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(acc[j][2], 4), _mm512_srai_epi32(acc[j][3], 6));
    _mm512_storeu_si512(out + 16 * j, _mm512_add_epi32(low, high));
  }
}

QAT_TARGET void dot_one(const uint32_t* tiles, const int8_t* words, int64_t blocks, int32_t* out) {
  __m512i mask[4], acc[kVectors][4];
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) mask[p] = _mm512_set1_epi8(static_cast<char>(3 << (2 * p)));
  clear_positions(acc);
  for (int64_t block = 0; block < blocks; ++block, tiles += kPanel, words += kBlock) {
    prefetch_block<_MM_HINT_T0>(tiles);
    __m512i x[4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) x[p] = broadcast(words + 4 * p);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const __m512i bytes = load(tiles + 16 * j);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) dpbusd(acc[j][p], _mm512_and_si512(bytes, mask[p]), x[p]);
    }
  }
  store_positions(acc, out);
}

QAT_TARGET void dot(const uint32_t* tiles, const int8_t* words, int64_t stride, int64_t blocks, int tokens, int32_t* acc) {
  switch (tokens) {
    case 1: return dot_one(tiles, words, blocks, acc);
    case 2: return dot_tokens<2>(tiles, words, stride, blocks, acc);
    case 3: return dot_tokens<3>(tiles, words, stride, blocks, acc);
    case 4: return dot_tokens<4>(tiles, words, stride, blocks, acc);
    case 5: return dot_tokens<5>(tiles, words, stride, blocks, acc);
    default: return dot_tokens<6>(tiles, words, stride, blocks, acc);
  }
}

struct Base3Table {
  alignas(64) uint8_t fields[128];
};

// base3_store's f -> c < 81 as four 2-bit fields.
constexpr Base3Table base3_table() {
  Base3Table table = {};
  for (uint32_t c = 0; c < 81; ++c)
    for (uint32_t d = 0; d < 3; ++d)
      table.fields[base3_store(c, d) - 64 * d] =
          static_cast<uint8_t>((c % 3) | (c / 3 % 3) << 2 | (c / 9 % 3) << 4 | (c / 27 % 3) << 6);
  return table;
}

constexpr Base3Table kBase3 = base3_table();

// A base-3 byte's fifth digit in bits 6 and 7, and its other four as 2-bit fields (see base3_store).
struct Base3 {
  __m512i low, high, top, zero;

  QAT_TARGET Base3()
      : low(load(kBase3.fields)),
        high(load(kBase3.fields + 64)),
        top(_mm512_set1_epi8(static_cast<char>(0xc0))),
        zero(_mm512_setzero_si512()) {}
  QAT_TARGET __m512i fifth(__m512i v) const { return _mm512_and_si512(_mm512_avg_epu8(v, _mm512_avg_epu8(v, zero)), top); }
  QAT_TARGET __m512i fields(__m512i v, __m512i fifth) const {
    return _mm512_permutex2var_epi8(low, _mm512_sub_epi8(v, fifth), high);
  }
};

QAT_TARGET void dot_base3(const uint32_t* tiles, const int8_t* words, int64_t supers, int32_t* out) {
  const Base3 base3;
  __m512i mask[3], acc[kVectors][4];
#pragma GCC unroll 4
  for (int p = 0; p < 3; ++p) mask[p] = _mm512_set1_epi8(static_cast<char>(3 << (2 * p)));
  clear_positions(acc);
  for (int64_t s = 0; s < supers; ++s, words += kSuperBlock) {
    for (int i = 0; i < 4; ++i, tiles += kPanel) {
      prefetch_block<_MM_HINT_T1>(tiles);
      __m512i x[4];
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) x[p] = broadcast(words + 16 * i + 4 * p);
      const __m512i x_fifth = broadcast(words + 64 + 4 * i);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const __m512i bytes = load(tiles + 16 * j), fifth = base3.fifth(bytes), fields = base3.fields(bytes, fifth);
#pragma GCC unroll 4
        for (int p = 0; p < 3; ++p) dpbusd(acc[j][p], _mm512_and_si512(fields, mask[p]), x[p]);
        dpbusd(acc[j][3], _mm512_and_si512(fields, base3.top), x[3]);
        dpbusd(acc[j][3], fifth, x_fifth);
      }
    }
  }
  store_positions(acc, out);
}

QAT_TARGET void expand_base3_64(const uint32_t* tiles, int64_t supers, uint32_t* out) {
  const Base3 base3;
  for (int64_t s = 0; s < supers; ++s, tiles += 4 * kPanel, out += 5 * kPanel) {
    for (int j = 0; j < kVectors; ++j) {
      __m512i fifths = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i bytes = load(tiles + i * kPanel + 16 * j), fifth = base3.fifth(bytes);
        _mm512_storeu_si512(out + i * kPanel + 16 * j, base3.fields(bytes, fifth));
        fifths = _mm512_or_si512(fifths, _mm512_srli_epi32(fifth, 6 - 2 * i));
      }
      _mm512_storeu_si512(out + 4 * kPanel + 16 * j, fifths);
    }
  }
}

QAT_TARGET int64_t peak(int64_t rounds) {
  constexpr int kChains = 12;
  __m512i acc[kChains], one = _mm512_set1_epi8(1);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = one;
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) asm volatile("vpdpbusd %1, %1, %0" : "+v"(acc[i]) : "v"(one));
  }
  return rounds * kChains * 128;
}

constexpr Isa with_avx512() {
  Isa isa = with_nearest(softened(path("avx512", kTokens, dot)));
  isa.to_float = to_float16;
  isa.from_float = from_float16;
  isa.absmax = absmax16;
  isa.quantize = quantize16;
  isa.attention = causal_attention;
  isa.dot_base3 = dot_base3;
  isa.expand_base3 = expand_base3_64;
  isa.peak = peak;
  return isa;
}

}  // namespace

constexpr Isa avx512 = with_avx512();

}  // namespace qat
#endif
