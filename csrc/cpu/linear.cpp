// The fused linear: which panel meets which tokens, and in what order; the arithmetic is the Isa's.
//
// Work is cut into items of (64 output rows) x (a chunk of tokens whose codes stay in the L2 cache). In an item the
// weights' 2-bit tiles stay in the cache too and are expanded in registers, again for every 6 tokens: the ALU has room
// beside the dot product unit, and 2 bits a weight cost no bandwidth.
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace qat {
namespace {

constexpr int64_t kChunkBytes = 192 << 10;

int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Row of x as floats: in place, or converted into `buffer`.
const float* float_row(const Linear& p, int64_t row, float* buffer) {
  const auto* start = static_cast<const char*>(p.x) + row * p.k * element_size(p.dtype);
  if (p.dtype == Dtype::f32) return reinterpret_cast<const float*>(start);
  p.isa->to_float(start, p.dtype, p.k, buffer);
  return buffer;
}

std::vector<float> float_buffer(const Linear& p) {
  return std::vector<float>(p.dtype == Dtype::f32 ? 0 : static_cast<std::size_t>(p.k));
}

float larger(float a, float b) { return b > a || b != b ? b : a; }

// The rescaling order is the reference's, which is stock transformers': acc / (divisor * (1 / w_scale)) + bias, or with
// groups sum_g(acc_g * w_scale_g) / divisor + bias.
struct Output {
  const Linear& p;
  int64_t row0;   // first output row of the panel
  int64_t rows;   // at most 64
  float inverse[kPanel];  // 1 / w_scale

  Output(const Linear& problem, int64_t panel)
      : p(problem), row0(panel * kPanel), rows(p.n - row0 < kPanel ? p.n - row0 : kPanel) {
    if (p.segments.count == 1)
      for (int64_t i = 0; i < kPanel; ++i)
        inverse[i] = 1.0f / (p.scale_per_row ? (i < rows ? p.scale[row0 + i] : 1.0f) : p.scale[0]);
  }

  void write(int64_t token, float* y) const {
    if (p.bias)
      for (int64_t i = 0; i < rows; ++i) y[i] += p.bias[row0 + i];
    p.isa->from_float(y, rows, p.dtype, static_cast<char*>(p.y) + (token * p.n + row0) * element_size(p.dtype));
  }

  void one_group(int64_t token, const int32_t* acc) const {
    float divisors[kPanel], y[kPanel];
    const float divisor = p.divisor[token];
    for (int64_t i = 0; i < kPanel; ++i) divisors[i] = divisor * inverse[i];
    p.isa->rescale(acc, p.sums[token], divisors, y);
    write(token, y);
  }

  void last_group(int64_t token, float* y) const {
    for (int64_t i = 0; i < kPanel; ++i) y[i] /= p.divisor[token];
    write(token, y);
  }
};

// All tokens [begin, end) of one panel, `tiles` being 2bit or, for a single token, base3.
void multiply_panel(const Linear& p, int64_t panel, const uint32_t* tiles, bool base3, int64_t begin, int64_t end) {
  const Segments& s = p.segments;
  const Output output(p, panel);
  alignas(64) int32_t acc[kMaxTokens * kPanel];
  alignas(64) float y[kMaxTokens * kPanel];
  for (int64_t token = begin; token < end;) {
    const int tokens = static_cast<int>(end - token < p.isa->tokens ? end - token : p.isa->tokens);
    for (float& value : y) value = 0.0f;
    for (int64_t g = 0; g < s.count; ++g) {
      const int8_t* words = p.words + token * s.row() + g * s.padded;
      if (base3) {
        p.isa->dot_base3(tiles + g * s.words(true), words, s.padded / kSuperBlock, acc);
      } else {
        p.isa->dot(tiles + g * s.words(false), words, s.row(), s.padded / kBlock, tokens, acc);
      }
      if (s.count == 1) break;
      const float* scale = p.scale + (panel * s.count + g) * kPanel;
      for (int m = 0; m < tokens; ++m)
        p.isa->accumulate(acc + m * kPanel, p.sums[(token + m) * s.count + g], scale, y + m * kPanel);
    }
    for (int m = 0; m < tokens; ++m) {
      if (s.count == 1) {
        output.one_group(token + m, acc + m * kPanel);
      } else {
        output.last_group(token + m, y + m * kPanel);
      }
    }
    token += tokens;
  }
}

}  // namespace

int64_t Linear::chunk_tokens() const {
  const int64_t row = segments.row() > 0 ? segments.row() : 1;
  const int64_t blocks = kChunkBytes / (row * isa->tokens);
  return (blocks > 1 ? blocks : 1) * isa->tokens;
}

int64_t Linear::items() const {
  const int64_t chunk = chunk_tokens();
  return panels() * ((m + chunk - 1) / chunk);
}

void measure_tokens(const Linear& p, int64_t begin, int64_t end) {
  auto buffer = float_buffer(p);
  for (int64_t row = begin; row < end; ++row) p.divisor[row] = p.isa->absmax(float_row(p, row, buffer.data()), p.k);
}

void quantize_row(const Isa& isa, const float* x, const Segments& s, float inverse, int8_t* words, int32_t* sums,
                  int8_t* codes) {
  if (inverse > 0.0f) return isa.quantize(x, s, inverse, words, sums, codes);
  const std::vector<float> zeros(static_cast<std::size_t>(s.count * s.length));
  isa.quantize(zeros.data(), s, 1.0f, words, sums, codes);
}

void quantize_tokens(const Linear& p, int64_t begin, int64_t end) {
  const Segments& s = p.segments;
  auto buffer = float_buffer(p);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = float_row(p, row, buffer.data());
    const float most = larger(p.eps, p.absmax < 0.0f ? p.isa->absmax(x, p.k) : p.absmax);
    const float inverse = 1.0f / most * 127.0f;  // torch computes 127 / tensor as a reciprocal and a product
    p.divisor[row] = inverse;
    if (p.x_scale) p.x_scale[row] = 1.0f / inverse;
    quantize_row(*p.isa, x, s, inverse, p.words + row * s.row(), p.sums + row * s.count,
                 p.codes ? p.codes + row * p.k : nullptr);
  }
}

void multiply(const Linear& p, int64_t begin, int64_t end) {
  const Segments& s = p.segments;
  const int64_t panels = p.panels(), chunk = p.chunk_tokens(), panel_words = s.count * s.words(p.base3);
  const bool direct = !p.base3 || p.m == 1;
  std::vector<uint32_t> expanded(direct ? 0 : static_cast<std::size_t>(s.row() / kBlock * kPanel));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item % panels, first = item / panels * chunk;
    const int64_t last = first + chunk < p.m ? first + chunk : p.m;
    const uint32_t* tiles = p.tiles + panel * panel_words;
    if (!direct) {
      p.isa->expand_base3(tiles, s.row() / kSuperBlock, expanded.data());
      tiles = expanded.data();
    }
    multiply_panel(p, panel, tiles, p.base3 && direct, first, last);
  }
}

void multiply(const Linear& p, const Threads& threads) {
  const int64_t tokens = p.m < p.chunk_tokens() ? p.m : p.chunk_tokens();
  share(threads, p.items(), grain(tokens * p.k * kPanel / 16), [&](int64_t begin, int64_t end) { multiply(p, begin, end); });
}

}  // namespace qat
