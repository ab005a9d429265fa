// Causal attention of training as torch ops, for heads too narrow for the BLAS that torch's flash attention multiplies blocks
// by: at D = 8 that spends several times what the arithmetic takes. qat/ops/attention.py decides which calls come here.
#include <tuple>

#include "ops_cpu.h"

namespace qat::binding {
namespace {

// x [B, heads, T, D]; the kernels write through none that is only read.
Heads heads_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 4 && x.stride(3) == 1,
                  "attention takes float32 [B, heads, T, D] whose last dimension is dense");
  return {static_cast<float*>(const_cast<void*>(x.const_data_ptr())), x.size(1), x.stride(0), x.stride(1), x.stride(2)};
}

// [B, T, heads, D] in memory, which is what the layers around it read, seen as [B, heads, T, D].
Tensor like(const Tensor& x) {
  return torch::stable::transpose(empty({x.size(0), x.size(2), x.size(1), x.size(3)}, ScalarType::Float), 1, 2);
}

Attention plan_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& statistics, double scale) {
  const int64_t tokens = q.size(2), width = q.size(3);
  for (const Tensor* x : {&k, &v})
    STD_TORCH_CHECK(x->dim() == 4 && x->size(0) == q.size(0) && x->size(1) == k.size(1) && x->size(2) == tokens &&
                        x->size(3) == width && q.size(1) % x->size(1) == 0,
                    "k and v do not fit q");
  STD_TORCH_CHECK(isa().attention && tokens % Attention::kRows == 0 && (width == 8 || width == 16 || width == 32),
                  "no attention for ", tokens, " tokens of width ", width);
  Attention p = {};
  p.q = heads_of(q), p.k = heads_of(k), p.v = heads_of(v), p.out = heads_of(out);
  auto* numbers = static_cast<float*>(const_cast<void*>(statistics.const_data_ptr()));
  p.most = numbers, p.inverse = numbers + statistics.numel() / 2;
  p.tokens = tokens, p.width = width, p.shared = q.size(1) / k.size(1), p.scale = static_cast<float>(scale);
  return p;
}

void all_rows(const Attention& p, Pass pass, int64_t heads) {
  const int64_t blocks = p.tokens / Attention::kRows;
  share(torch_threads(), heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) isa().attention(p, pass, i / blocks, i % blocks * Attention::kRows);
  });
}

// The output [B, H, T, D], and [2, B, H, T] for the backward pass: the softmax's maxima, and the reciprocals of its sums.
std::tuple<Tensor, Tensor> cpu_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  Tensor out = like(q), statistics = empty({2, q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  all_rows(plan_of(q, k, v, out, statistics, scale), Pass::forward, q.size(0) * q.size(1));
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> cpu_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                                          const Tensor& out, const Tensor& statistics, double scale) {
  Tensor grad_q = like(q), grad_k = like(k), grad_v = like(v);
  Attention p = plan_of(q, k, v, out, statistics, scale);
  const Scratch<float> drift(q.size(0) * q.size(1) * q.size(2));
  p.grad = heads_of(grad), p.grad_q = heads_of(grad_q), p.grad_k = heads_of(grad_k), p.grad_v = heads_of(grad_v);
  p.drift = drift.get();
  all_rows(p, Pass::queries, q.size(0) * q.size(1));
  all_rows(p, Pass::keys, k.size(0) * k.size(1));
  return {grad_q, grad_k, grad_v};
}

bool cpu_attention_serves() { return isa().attention != nullptr; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cpu_attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)");
  m.def(
      "cpu_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, float scale)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("cpu_attention_serves() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_attention", TORCH_BOX(&cpu_attention));
  m.impl("cpu_attention_backward", TORCH_BOX(&cpu_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) {
  m.impl("cpu_attention_serves", TORCH_BOX(&cpu_attention_serves));
}

}  // namespace qat::binding
