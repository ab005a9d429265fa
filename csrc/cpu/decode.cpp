// The decoder's steps between its linears, and the linears for one token. Scratch is taken once a token, for the largest
// of the linears; everything but the linears and the heads is small enough for the calling thread.
#include "decode.h"

#include <cstring>
#include <vector>

namespace qat {
namespace {

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What one token needs, in sizes of the widest layer.
struct Sizes {
  int64_t qkv = 0, gated = 0, row = 0, groups = 0;

  explicit Sizes(const Decoder& p) {
    for (int64_t i = 0; i < p.count; ++i) {
      const DecoderLayer& layer = p.layers[i];
      qkv = larger(qkv, layer.qkv.n);
      gated = larger(gated, layer.gate_up.n);
      for (const Linear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
        row = larger(row, linear->segments.row());
        groups = larger(groups, linear->segments.count);
      }
    }
  }
};

class Token {
 public:
  Token(const Decoder& p, const Threads& threads, float* x)
      : Token(p, threads, x, Sizes(p)) {}

  void through(const DecoderLayer& layer, float* keys, float* values) const {
    p_.isa->rms_norm(x_, layer.norm, p_.hidden, p_.norm_eps, normed_.get());
    linear(layer.qkv, normed_.get(), qkv_.get());
    turn_heads(layer);
    remember(keys, values);
    attend(keys, values);
    linear(layer.o, attended_.get(), out_.get());
    add();
    p_.isa->rms_norm(x_, layer.mlp_norm, p_.hidden, p_.norm_eps, normed_.get());
    linear(layer.gate_up, normed_.get(), gated_.get());
    p_.isa->gate(gated_.get(), gated_.get() + layer.down.k, layer.down.k);
    linear(layer.down, gated_.get(), out_.get());
    add();
  }

 private:
  Token(const Decoder& p, const Threads& threads, float* x, const Sizes& s)
      : p_(p), threads_(threads), x_(x), normed_(p.hidden), out_(p.hidden), qkv_(s.qkv), attended_(p.heads * p.width),
        gated_(s.gated), scores_(p.heads * p.room), words_(s.row), sums_(s.groups) {}

  // y of one float32 token.
  void linear(const Linear& weights, const float* x, float* y) const {
    float divisor;
    Linear p = weights;
    p.x = x;
    p.y = y;
    p.dtype = Dtype::f32;
    p.m = 1;
    p.words = words_.get();
    p.sums = sums_.get();
    p.divisor = &divisor;
    quantize_tokens(p, 0, 1);
    multiply(p, threads_);
  }

  // Norm and rotary embedding of the q and k heads.
  void turn_heads(const DecoderLayer& layer) const {
    for (int64_t head = 0; head < p_.heads + p_.kv_heads; ++head) {
      float* part = qkv_.get() + head * p_.width;
      const float* norm = head < p_.heads ? layer.q_norm : layer.k_norm;
      if (norm) p_.isa->rms_norm(part, norm, p_.width, p_.norm_eps, part);
      p_.isa->rotate(part, p_.cos, p_.sin, p_.rotary);
    }
  }

  // The token's keys and values, into one layer's cache.
  void remember(float* keys, float* values) const {
    const auto bytes = static_cast<std::size_t>(p_.width) * sizeof(float);
    for (int64_t head = 0; head < p_.kv_heads; ++head) {
      const int64_t at = (head * p_.room + p_.position) * p_.width;
      std::memcpy(keys + at, qkv_.get() + (p_.heads + head) * p_.width, bytes);
      std::memcpy(values + at, qkv_.get() + (p_.heads + p_.kv_heads + head) * p_.width, bytes);
    }
  }

  void attend(const float* keys, const float* values) const {
    const int64_t length = p_.position + 1, sharing = p_.heads / p_.kv_heads;
    share(threads_, p_.heads, grain(2 * length * p_.width), [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        const int64_t first = head / sharing * p_.room * p_.width, at = head * p_.width;
        p_.isa->attend(qkv_.get() + at, keys + first, values + first, length, p_.width, p_.scaling,
                       scores_.get() + head * p_.room, attended_.get() + at);
      }
    });
  }

  void add() const {
    for (int64_t i = 0; i < p_.hidden; ++i) x_[i] += out_.get()[i];
  }

  const Decoder& p_;
  const Threads& threads_;
  float* x_;
  const Scratch<float> normed_, out_, qkv_, attended_, gated_, scores_;
  const Scratch<int8_t> words_;
  const Scratch<int32_t> sums_;
};

}  // namespace

void decode(const Decoder& p, const Threads& threads, float* x) {
  const int64_t block = p.kv_heads * p.room * p.width;
  const Token token(p, threads, x);
  for (int64_t i = 0; i < p.count; ++i) token.through(p.layers[i], p.keys + i * block, p.values + i * block);
}

}  // namespace qat
