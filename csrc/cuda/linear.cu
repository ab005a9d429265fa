// Which kernels a linear takes: host code only.
#include "elements.h"
#include "internal.h"

namespace qat::cuda {
namespace {

bool wrong(int64_t m, int64_t n, int64_t k, int64_t groups) {
  return m < 0 || n < 0 || k < 1 || k > kMaxWidth || groups < 1 || k % groups;
}

struct Way {
  bool hopper;
  Plan plan;
};

template <class P>
Way way(const P& p, bool may_split) {
  const int sms = multiprocessors();
  const Plan plan = gemm_plan(sms, p.m, p.n, p.k, p.groups, may_split);
  if (!hopper_wanted() || !hopper_serves(p)) return {false, plan};
  const Plan other = hopper_plan(sms, p.m, p.n, p.k, may_split);
  return other.cycles <= plan.cycles ? Way{true, other} : Way{false, plan};
}

template <class P>
int64_t partial_of(const P& p) {
  if (wrong(p.m, p.n, p.k, p.groups) || p.m == 0 || p.n == 0) return 0;
  return partial_bytes(p.m, p.n, way(p, true).plan.splits);
}

}  // namespace

int64_t partial_bytes(const Linear& p) { return partial_of(p); }
int64_t partial_bytes(const PackedLinear& p) { return decode_serves(p) ? 0 : partial_of(p); }

int linear(const Linear& p, cudaStream_t stream) {
  if (wrong(p.m, p.n, p.k, p.groups) || (p.raw && p.groups != 1)) return kInvalidValue;
  if (p.m == 0 || p.n == 0) return 0;
  const auto [hopper, plan] = way(p, p.partial);
  return hopper ? hopper_gemm(p, plan.splits, stream) : gemm(p, plan, stream);
}

int packed_linear(const PackedLinear& p, cudaStream_t stream) {
  if (wrong(p.m, p.n, p.k, p.groups)) return kInvalidValue;
  if (p.m == 0 || p.n == 0) return 0;
  if (packed_linear_fused(p)) return decode(p, stream);
  if (!p.codes || !p.divisor) return kInvalidValue;
  const bool few = decode_serves(p);
  if (const int error = quantize_interleaved(p, few ? Order::fields : Order::nibbles, stream)) return error;
  if (few) return decode(p, stream);
  const auto [hopper, plan] = way(p, p.partial);
  return hopper ? hopper_packed_gemm(p, plan.splits, stream) : packed_gemm(p, plan, stream);
}

}  // namespace qat::cuda
