// The CPU kernels' interface: raw pointers only, so that they build and are tested without torch.
//
// Legend: M tokens, N out_features, K in_features, G groups along K; KP = K with every group padded to whole blocks.
//
// Weights in memory ("tiles"). The lane of a vector is an output row, so nothing is ever summed across lanes and the
// activations are broadcast. A word (32 bits) holds 16 consecutive codes t + 1 of one row; byte b, bits 2p hold code
// 4 b + p, which is the on-disk order, so making tiles only moves words.
//     2bit   tiles[N / 64][KP / 16][64]       uint32, KP a multiple of 16 in each group
//     base3  tiles[N / 64][KP / 80][4][64]    uint32, KP a multiple of 80: 4 words hold what takes 5 in 2bit.
//            Byte b of word i holds codes 16 i + 4 b + 0..3 and, as fifth digit, 64 + 4 b + i (see base3_store).
//
// Activations in memory ("words"): words[M][KP] int8; in each block of 16, byte 4 p + b is element 4 b + p, so that
// one broadcast of 4 bytes meets the bits 2p of a weight word. Padding is 0.
//
// The integers: a dot gives sum((t + 1) * x_q); the caller subtracts sum(x_q). Both are exact in int32 for K < 2^19.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qat {

constexpr int64_t kPanel = 64;       // output rows that share a stream of tiles
constexpr int64_t kBlock = 16;       // codes a word
constexpr int64_t kSuperBlock = 80;  // codes in the 4 words of a base-3 superblock
constexpr int kMaxTokens = 6;        // most tokens a dot takes at once

enum class Dtype { f32, bf16, f16 };

// How the K elements of a row are cut and padded.
struct Segments {
  int64_t count;   // G
  int64_t length;  // K / G
  int64_t padded;  // KP / G

  static Segments of(int64_t k, int64_t groups, bool base3) {
    const int64_t unit = base3 ? kSuperBlock : kBlock, length = groups > 0 ? k / groups : 0;
    return {groups, length, (length + unit - 1) / unit * unit};
  }
  int64_t row() const { return count * padded; }
  // Words of one panel's tiles in one group.
  int64_t words(bool base3) const { return base3 ? padded / kSuperBlock * 4 * kPanel : padded / kBlock * kPanel; }
};

// A border between two levels of a row's codes, as soft.h computes with it.
struct Border {
  float at, factor;   // beta / D, for levels D apart; 0 where they are equal
  float half, slope;  // D / 2; beta, or 0 where they are equal
};
struct Soft {
  static constexpr float kMostSharp = 80.0f;  // largest beta of soften_ternary
  float middle;  // between the first and the last level
  int64_t count;
  const Border* borders;
};

// Rows [T, D] of one head, `stride` floats apart.
struct View {
  float* data;
  int64_t stride;
  float* row(int64_t i) const { return data + i * stride; }
};

// [B, heads, T, D] wherever it lies, its last dimension dense; head b * heads + h is one of B * heads.
struct Heads {
  float* data;
  int64_t heads, batch_stride, head_stride, row_stride;
  View of(int64_t head) const { return {data + head / heads * batch_stride + head % heads * head_stride, row_stride}; }
};

// softmax(scale * Q K^T, causal) V and its gradients, for T a multiple of 16. `shared` query heads read one key head.
struct Attention {
  static constexpr int64_t kRows = 16;
  Heads q, k, v, out;
  Heads grad, grad_q, grad_k, grad_v;  // backward only; grad is that of `out`
  float *most, *inverse, *drift;       // [B, H, T]: the softmax's maximum and the reciprocal of its sum; sum of dO * O
  int64_t tokens, width, shared;
  float scale;
};
enum class Pass { forward, queries, keys };

// A row's levels in ascending order, as codes, and the borders between them (nearest.h).
struct Book {
  static constexpr int kMostPlanes = 4;
  int64_t borders;
  int planes;
  const float* border;  // [borders]
  const int8_t* codes;  // [borders + 1][planes]
};

// One instruction set's kernels. acc is [tokens][64] int32 and is overwritten.
struct Isa {
  const char* name;
  int tokens;  // how many tokens `dot` takes at most
  void (*to_float)(const void* x, Dtype dtype, int64_t n, float* out);
  void (*from_float)(const float* x, int64_t n, Dtype dtype, void* out);
  float (*absmax)(const float* x, int64_t n);  // NaN where x holds one
  // Codes of one row, in words' order, with one sum a group; `codes` [K], in natural order, may be null.
  void (*quantize)(const float* x, const Segments& s, float inverse, int8_t* words, int32_t* sums, int8_t* codes);
  void (*dot)(const uint32_t* tiles, const int8_t* words, int64_t stride, int64_t blocks, int tokens, int32_t* acc);
  // Null where base-3 tiles do not pay (weights in base3 then get 2bit tiles): one token, and one panel's tiles to 2bit.
  void (*dot_base3)(const uint32_t* tiles, const int8_t* words, int64_t supers, int32_t* acc);
  void (*expand_base3)(const uint32_t* tiles, int64_t supers, uint32_t* out);
  // y = (acc - sum) / divisor, or y += (acc - sum) * scale for one group among several.
  void (*rescale)(const int32_t* acc, int32_t sum, const float* divisor, float* y);
  void (*accumulate)(const int32_t* acc, int32_t sum, const float* scale, float* y);
  // t = clip(round(w / scale), -1, 1), or w > threshold ? 1 : -1.
  void (*ternary)(const float* w, int64_t n, float scale, int8_t* t);
  void (*binary)(const float* w, int64_t n, float threshold, int8_t* t);
  // Sums in double of x, |x| and x^2: each in one order, whatever the path.
  double (*sum)(const float* x, int64_t n);
  double (*magnitudes)(const float* x, int64_t n);
  double (*squares)(const float* x, int64_t n);
  // A code a plane for n weights: those of the level that the borders below a weight number.
  void (*nearest)(const float* w, int64_t n, const Book& book, int8_t* const* out);
  void (*dequantize)(const int8_t* codes, int64_t n, float scale, float* out);
  // Soft weights and their slopes (soft.h), for any levels, and for -s, 0, s with the borders half way.
  void (*soften)(const float* w, int64_t n, const Soft& p, float* soft, float* slope);
  void (*soften_ternary)(const float* w, int64_t n, const Soft& p, float* soft, float* slope);
  // y = x factor; y = x - y; and y = (a by_a + b by_b) factor + bias for integers a and b, bias perhaps null.
  void (*scale)(const float* x, int64_t n, float factor, float* y);
  void (*subtract)(const float* x, int64_t n, float* y);
  void (*join)(const int32_t* a, const int32_t* b, int64_t n, const float* by_a, const float* by_b, float factor,
               const float* bias, float* y);
  // What lies between the linears of a decoder, for one token (decode.h): y = x / rms(x) * weight;
  // y = silu(y) * up; rotary embedding in halves over a head's first n elements, x cos + (-x2, x1) sin; and one head's
  // softmax(q K^T * scale) V over `length` positions, with `weights` [length] as scratch.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);
  void (*gate)(float* y, const float* up, int64_t n);
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t n);
  void (*attend)(const float* q, const float* keys, const float* values, int64_t length, int64_t width, float scale,
                 float* weights, float* y);
  // 16 rows of a head of training's attention (attention.h), of queries or of keys; null where torch's own is faster.
  void (*attention)(const Attention& p, Pass pass, int64_t head, int64_t first);
  // y = rows x, for `n` rows [K] in float32 or bfloat16: every product and sum is one of float32 values.
  void (*rows)(const float* x, const void* rows, Dtype dtype, int64_t n, int64_t k, float* y);
  // For qat.bench: a sum that reads n words, and `rounds` of nothing but dot products, giving the number of operations.
  uint64_t (*read)(const uint64_t* words, int64_t n);
  int64_t (*peak)(int64_t rounds);  // null where there is no such instruction
};

// A base-3 byte is 64 d + f, d the fifth digit: [0, 85) has d = 0, [85, 170) d = 1 and the rest d = 2, so two rounding
// averages find 64 d, and a table of 128 finds the other four digits, c < 81, from f. c = 0..42 has one f that fits all
// three ranges; c = 43..63 and 64..80 have two.
constexpr uint32_t base3_store(uint32_t c, uint32_t d) {
  if (c < 43) return 64 * d + 42 + c;
  if (c < 64) return 64 * d + (d < 2 ? 21 : 106) + (c - 43);
  return 64 * d + (d < 1 ? 0 : 85) + (c - 64);
}

extern const Isa portable;
#if defined(__x86_64__)
extern const Isa avx2, avx512;
#elif defined(__aarch64__)
extern const Isa neon;
#endif

// The paths, slowest first, and the index of the last one that this machine has.
const Isa& isa_at(int index);
int best_isa();
// The path in use: the best one, until another is taken.
const Isa& isa();
void take_isa(int index);

// A fused linear. The caller runs quantize_tokens over all tokens, then multiply over all items.
struct Linear {
  const Isa* isa;
  const void* x;          // [M, K]
  void* y;                // [M, N]
  Dtype dtype;            // of x and y
  const uint32_t* tiles;
  bool base3;             // format of the tiles
  const float* scale;     // G = 1: [1] or [N]; G > 1: [ceil(N / 64)][G][64]
  bool scale_per_row;     // G = 1 only
  const float* bias;      // [N] or null
  int64_t m, n, k;
  Segments segments;
  float eps;
  float absmax;           // of the whole tensor, or below 0: each token its own
  int8_t* words;          // [M, KP], scratch
  int32_t* sums;          // [M, G], scratch
  float* divisor;         // [M], 127 / max|x|, scratch
  float* x_scale;         // [M], its reciprocal, or null
  int8_t* codes;          // [M, K] or null

  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t chunk_tokens() const;
  int64_t items() const;  // units of work of `multiply`
};

void measure_tokens(const Linear& p, int64_t begin, int64_t end);  // max|x| of each token into divisor
void quantize_tokens(const Linear& p, int64_t begin, int64_t end);
// Isa::quantize of a whole row; one that holds Inf or NaN, whose inverse is 0 or NaN, has codes of 0, as in torch.
void quantize_row(const Isa& isa, const float* x, const Segments& s, float inverse, int8_t* words, int32_t* sums, int8_t* codes);
void multiply(const Linear& p, int64_t begin, int64_t end);
struct Threads;  // threads.h
void multiply(const Linear& p, const Threads& threads);  // all items, shared among them

// Tiles of the panels [begin, end) from rows of codes: `2bit` or `base3` bytes, or int8 t.
enum class Source { bits, base3, codes };
struct Tiling {
  Source source;
  const void* rows;   // [N, row_bytes]
  int64_t row_bytes;
  int64_t n;
  Segments segments;
  bool base3;         // format of the tiles
  uint32_t* tiles;
};
void make_tiles(const Tiling& p, int64_t begin, int64_t end);

// Order-dependent 64-bit hash of n bytes, to notice a weight that was changed behind its version counter.
uint64_t fingerprint(const void* data, int64_t n);

}  // namespace qat
