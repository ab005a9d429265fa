// The kernels of attention.cpp, once for each instruction set: the including file defines QAT_TARGET, `Lanes` (16 floats)
// and `multiply_add`. A vector's lanes are 16 queries (forward, dQ) or 16 keys (dK, dV), against which rows of the other side
// are broadcast element by element, so that nothing is summed across lanes. Scores are made anew in each pass: to keep them
// would cost more than D products.
#pragma once
#include "kernels.h"

namespace qat {
namespace {

constexpr int64_t kRows = Attention::kRows, kTogether = 4, kChunk = 64;  // rows broadcast at once; keys between two maxima

QAT_TARGET inline Lanes all(float value) {  // not Lanes{} + value, whose addition the compiler must make
  const float v = value;
  return Lanes{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
}

// e^x to 2e-7 for x <= 0, and 0 below -87; NaN stays NaN. 2^n e^r with |r| <= ln(2) / 2 (Cephes' polynomial).
QAT_TARGET inline Lanes exponential_of(Lanes x) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Lanes)), may_alias));
  const Lanes low = all(-87.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Lanes bounded = x < low ? low : x;
  const Lanes shifted = multiply_add(bounded, all(1.44269504f), magic), n = shifted - magic;
  const Lanes r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), bounded));
  Lanes y = multiply_add(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
  y = multiply_add(y, r, all(8.3334519073e-3f));
  y = multiply_add(y, r, all(4.1665795894e-2f));
  y = multiply_add(y, r, all(1.6666665459e-1f));
  y = multiply_add(y, r, all(5.0000001201e-1f));
  y = multiply_add(y, r * r, r + 1.0f);
  const Bits power = ((Bits)shifted << 23) + 0x3f800000u;  // wraps: the bits of `magic` itself leave at the top
  return x < low ? Lanes{} : y * (Lanes)power;
}

QAT_TARGET inline Lanes numbered_from(int64_t first) {
  return Lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + static_cast<float>(first);
}

QAT_TARGET inline Lanes load_lanes(const float* x) {
  Lanes value;
  std::memcpy(&value, x, sizeof value);
  return value;
}

// columns[d][lane] = factor * rows[lane][d].
template <int D>
QAT_TARGET void gather(const float* rows, int64_t stride, float factor, Lanes* columns) {
  for (int64_t lane = 0; lane < kRows; ++lane)
    for (int d = 0; d < D; ++d) columns[d][lane] = rows[lane * stride + d] * factor;
}

template <int D>
QAT_TARGET void scatter(const Lanes* columns, float* rows, int64_t stride) {
  for (int64_t lane = 0; lane < kRows; ++lane)
    for (int d = 0; d < D; ++d) rows[lane * stride + d] = columns[d][lane];
}

// out[i] = sum over d of columns[d] * rows[i][d], for 4 rows.
template <int D>
QAT_TARGET inline void products(const Lanes* columns, const float* rows, int64_t stride, Lanes* out) {
  Lanes sum[kTogether] = {};
#pragma GCC unroll 64
  for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) sum[i] = multiply_add(columns[d], all(rows[i * stride + d]), sum[i]);
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i) out[i] = sum[i];
}

// sums[d] += sum over i of weights[i] * rows[i][d], for 4 rows.
template <int D>
QAT_TARGET inline void add_products(const Lanes* weights, const float* rows, int64_t stride, Lanes* sums) {
#pragma GCC unroll 64
  for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) sums[d] = multiply_add(weights[i], all(rows[i * stride + d]), sums[d]);
}

// 16 queries: their outputs, and what the softmax needs to be made anew, its maximum and the reciprocal of its sum.
template <int D>
QAT_TARGET void attend_forward(const Attention& p, int64_t head, int64_t first) {
  Lanes q[D], sums[D] = {}, scores[kChunk];
  const View keys = p.k.of(head / p.shared), values = p.v.of(head / p.shared), queries = p.q.of(head);
  gather<D>(queries.row(first), queries.stride, p.scale, q);
  const Lanes query = numbered_from(first);
  Lanes most = all(-3.0e38f), total = {};
  for (int64_t chunk = 0; chunk < first + kRows; chunk += kChunk) {
    const int64_t left = first + kRows - chunk, count = left < kChunk ? left : kChunk;
    Lanes peak = most;
    for (int64_t i = 0; i < count; i += kTogether) {
      products<D>(q, keys.row(chunk + i), keys.stride, scores + i);
      for (int64_t j = i; j < i + kTogether; ++j) {
        if (chunk + j >= first) scores[j] = query < static_cast<float>(chunk + j) ? all(-3.0e38f) : scores[j];
        peak = scores[j] < peak ? peak : scores[j];  // of what is seen only: beside a higher one all the rest would vanish
      }
    }
    const Lanes shrink = exponential_of(most - peak);
    most = peak;
    total *= shrink;
    for (int d = 0; d < D; ++d) sums[d] *= shrink;
    for (int64_t i = 0; i < count; i += kTogether) {
      for (int64_t j = i; j < i + kTogether; ++j) {
        scores[j] = exponential_of(scores[j] - most);
        total += scores[j];
      }
      add_products<D>(scores + i, values.row(chunk + i), values.stride, sums);
    }
  }
  const Lanes inverse = 1.0f / total;
  for (int d = 0; d < D; ++d) sums[d] *= inverse;
  const View out = p.out.of(head);
  scatter<D>(sums, out.row(first), out.stride);
  std::memcpy(p.most + head * p.tokens + first, &most, sizeof most);
  std::memcpy(p.inverse + head * p.tokens + first, &inverse, sizeof inverse);
}

// 16 queries: dQ, and `drift`, the sum of dO * O, which the keys' pass reads.
template <int D>
QAT_TARGET void attend_queries(const Attention& p, int64_t head, int64_t first) {
  Lanes q[D], grad[D], sums[D] = {}, drift = {};
  const View keys = p.k.of(head / p.shared), values = p.v.of(head / p.shared), queries = p.q.of(head);
  const View grads = p.grad.of(head), out = p.out.of(head);
  gather<D>(out.row(first), out.stride, 1.0f, q);
  gather<D>(grads.row(first), grads.stride, 1.0f, grad);
  for (int d = 0; d < D; ++d) drift = multiply_add(grad[d], q[d], drift);
  gather<D>(queries.row(first), queries.stride, p.scale, q);
  const int64_t at = head * p.tokens + first;
  const Lanes most = load_lanes(p.most + at), inverse = load_lanes(p.inverse + at), query = numbered_from(first);
  for (int64_t i = 0; i < first + kRows; i += kTogether) {
    Lanes score[kTogether], change[kTogether];
    products<D>(q, keys.row(i), keys.stride, score);
    products<D>(grad, values.row(i), values.stride, change);
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTogether; ++j) {
      const Lanes weight = exponential_of(score[j] - most) * inverse * (change[j] - drift);
      score[j] = query < static_cast<float>(i + j) ? Lanes{} : weight;
    }
    add_products<D>(score, keys.row(i), keys.stride, sums);
  }
  for (int d = 0; d < D; ++d) sums[d] *= p.scale;
  const View out_grad = p.grad_q.of(head);
  scatter<D>(sums, out_grad.row(first), out_grad.stride);
  std::memcpy(p.drift + at, &drift, sizeof drift);
}

// 16 keys of a key head: dK and dV from all the query heads that share it.
template <int D>
QAT_TARGET void attend_keys(const Attention& p, int64_t kv_head, int64_t first) {
  Lanes k[D], v[D], sum_k[D] = {}, sum_v[D] = {};
  const View keys = p.k.of(kv_head), values = p.v.of(kv_head);
  gather<D>(keys.row(first), keys.stride, p.scale, k);
  gather<D>(values.row(first), values.stride, 1.0f, v);
  const Lanes key = numbered_from(first);
  for (int64_t head = kv_head * p.shared; head < (kv_head + 1) * p.shared; ++head) {
    const View queries = p.q.of(head), grads = p.grad.of(head);
    for (int64_t i = first; i < p.tokens; i += kTogether) {
      Lanes score[kTogether], change[kTogether];
      products<D>(k, queries.row(i), queries.stride, score);
      products<D>(v, grads.row(i), grads.stride, change);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kTogether; ++j) {
        const int64_t at = head * p.tokens + i + j;
        const Lanes weight = exponential_of(score[j] - p.most[at]) * p.inverse[at];
        score[j] = static_cast<float>(i + j) < key ? Lanes{} : weight;
        change[j] = score[j] * (change[j] - p.drift[at]);
      }
      add_products<D>(score, grads.row(i), grads.stride, sum_v);
      add_products<D>(change, queries.row(i), queries.stride, sum_k);
    }
  }
  for (int d = 0; d < D; ++d) sum_k[d] *= p.scale;
  const View grad_k = p.grad_k.of(kv_head), grad_v = p.grad_v.of(kv_head);
  scatter<D>(sum_k, grad_k.row(first), grad_k.stride);
  scatter<D>(sum_v, grad_v.row(first), grad_v.stride);
}

template <int D>
QAT_TARGET void attention_of(const Attention& p, Pass pass, int64_t head, int64_t first) {
  if (pass == Pass::forward) attend_forward<D>(p, head, first);
  if (pass == Pass::queries) attend_queries<D>(p, head, first);
  if (pass == Pass::keys) attend_keys<D>(p, head, first);
}

QAT_TARGET void causal_attention(const Attention& p, Pass pass, int64_t head, int64_t first) {
  if (p.width == 8) attention_of<8>(p, pass, head, first);
  if (p.width == 16) attention_of<16>(p, pass, head, first);
  if (p.width == 32) attention_of<32>(p, pass, head, first);
}

}  // namespace
}  // namespace qat
