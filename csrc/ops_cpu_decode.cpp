// One token at a time: a whole decoder (cpu/decode.h), and a matrix in full precision.
#include <cstring>

#include "cpu/decode.h"
#include "ops_cpu.h"

namespace qat::binding {
namespace {

// A packed linear among a decoder's weights: tiles, scale, bias (empty: none) and [N, K, G, base3].
struct Projection {
  static constexpr size_t kTensors = 3, kSizes = 4;
  const Tensor &tiles, &scale, &bias;
  int64_t n, k, groups;
  bool base3;

  Projection(const Tensor* tensors, const int64_t* sizes)
      : tiles(tensors[0]), scale(tensors[1]), bias(tensors[2]), n(sizes[0]), k(sizes[1]), groups(sizes[2]),
        base3(sizes[3] != 0) {}

  Linear linear(double eps) const { return with_weights(tiles, scale, bias.numel() ? &bias : nullptr, n, k, groups, base3, eps); }
};

// One layer's part of a decoder's weights and sizes, in this order; the norms of q and k heads may be empty.
struct Weights {
  static constexpr size_t kTensors = 16, kSizes = 16;
  const Tensor& norm;
  const Projection qkv, o;
  const Tensor& mlp_norm;
  const Projection gate_up, down;
  const Tensor &q_norm, &k_norm;

  Weights(const Tensor* w, const int64_t* sizes)
      : norm(w[0]), qkv(w + 1, sizes), o(w + 4, sizes + 4), mlp_norm(w[7]), gate_up(w + 8, sizes + 8), down(w + 11, sizes + 12),
        q_norm(w[14]), k_norm(w[15]) {}

  bool fit(const Decoder& p) const {
    const int64_t q_width = p.heads * p.width, kv_width = p.kv_heads * p.width;
    const bool attention = qkv.n == q_width + 2 * kv_width && qkv.k == p.hidden && o.n == p.hidden && o.k == q_width;
    return attention && gate_up.n == 2 * down.k && gate_up.k == p.hidden && down.n == p.hidden;
  }

  DecoderLayer layer(const Decoder& p, double eps) const {
    STD_TORCH_CHECK(fit(p), "projections do not fit each other");
    const auto head_norm = [&](const Tensor& x) { return x.numel() ? floats(x, p.width, "head norm") : nullptr; };
    return {floats(norm, p.hidden, "norm"), qkv.linear(eps),     o.linear(eps),     floats(mlp_norm, p.hidden, "norm"),
            gate_up.linear(eps),            down.linear(eps), head_norm(q_norm), head_norm(k_norm)};
  }
};

// One token [1, H] through all layers. Its keys and values are written at `position` of keys and values
// [layers, KV heads, room, D]. Every tensor is checked before the first is read.
Tensor cpu_decode(const Tensor& x, const std::vector<Tensor> weights, const std::vector<int64_t> sizes, const Tensor& keys,
                  const Tensor& values, const Tensor& cos, const Tensor& sin, int64_t position, int64_t heads, double norm_eps,
                  double act_eps, double scaling) {
  Decoder p = {};
  p.isa = &isa();
  p.count = keys.size(0), p.kv_heads = keys.size(1), p.room = keys.size(2), p.width = keys.size(3);
  p.hidden = x.numel(), p.heads = heads, p.rotary = cos.numel(), p.position = position;
  p.norm_eps = static_cast<float>(norm_eps), p.scaling = static_cast<float>(scaling);
  const auto count = static_cast<size_t>(p.count);
  const bool complete = weights.size() == count * Weights::kTensors && sizes.size() == count * Weights::kSizes;
  STD_TORCH_CHECK(complete, "wrong number of weights");
  STD_TORCH_CHECK(position >= 0 && position < p.room && p.kv_heads > 0 && heads % p.kv_heads == 0 && p.rotary <= p.width &&
                      p.rotary % 2 == 0,
                  "wrong position, heads or rotary width");
  p.cos = floats(cos, p.rotary, "cos"), p.sin = floats(sin, p.rotary, "sin");
  const int64_t cached = p.count * p.kv_heads * p.room * p.width;
  floats(keys, cached, "keys"), floats(values, cached, "values");
  p.keys = static_cast<float*>(keys.mutable_data_ptr()), p.values = static_cast<float*>(values.mutable_data_ptr());
  const float* start = floats(x, p.hidden, "x");
  std::vector<DecoderLayer> layers;
  layers.reserve(count);
  for (size_t i = 0; i < count; ++i)
    layers.push_back(Weights(&weights[i * Weights::kTensors], &sizes[i * Weights::kSizes]).layer(p, act_eps));
  p.layers = layers.data();

  Tensor y = empty({1, p.hidden}, ScalarType::Float);
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  std::memcpy(out, start, static_cast<size_t>(p.hidden) * sizeof(float));
  decode(p, torch_threads(), out);
  return y;
}

// y = x W^T of a few float32 tokens x [..., K] and W [N, K] in float32 or bfloat16, in float32: a matrix in full precision
// at the memory's speed, which torch's, made for many tokens, does not reach.
Tensor cpu_rows(const Tensor& x_any, const Tensor& weight) {
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const auto sizes = x.sizes();
  const Dtype dtype = dtype_of(weight);
  const bool matrix = weight.is_contiguous() && weight.dim() == 2 && dtype != Dtype::f16;
  STD_TORCH_CHECK(matrix, "weight must be contiguous float32 or bfloat16 [N, K]");
  const int64_t n = weight.size(0), k = weight.size(1);
  const bool fits = x.scalar_type() == ScalarType::Float && sizes.size() >= 1 && sizes[sizes.size() - 1] == k;
  STD_TORCH_CHECK(fits, "x must be float32 [..., ", k, "]");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = n;
  Tensor y = empty(shape, ScalarType::Float);
  constexpr int64_t block = 16;  // rows, which stay in the cache for all tokens
  const int64_t m = n > 0 ? y.numel() / n : 0, blocks = (n + block - 1) / block;
  if (m == 0) return y;
  const auto* in = static_cast<const float*>(x.const_data_ptr());
  const auto* rows = static_cast<const char*>(weight.const_data_ptr());
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  share(torch_threads(), blocks, grain(m * block * k / 16), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * block; row < end * block && row < n; row += block) {
      const int64_t count = n - row < block ? n - row : block;
      for (int64_t token = 0; token < m; ++token)
        isa().rows(in + token * k, rows + row * k * weight.element_size(), dtype, count, k, out + token * n + row);
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cpu_rows(Tensor x, Tensor weight) -> Tensor");
  m.def(
      "cpu_decode(Tensor x, Tensor[] weights, int[] sizes, Tensor(a!) keys, Tensor(b!) values, Tensor cos, Tensor sin,"
      " int position, int heads, float norm_eps, float act_eps, float scaling) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_rows", TORCH_BOX(&cpu_rows));
  m.impl("cpu_decode", TORCH_BOX(&cpu_decode));
}

}  // namespace qat::binding
