// Which kernels a linear takes: host code only.
#include "elements.h"
#include "internal.h"

namespace qat::cuda {
namespace {

bool wrong(int64_t m, int64_t n, int64_t k, int64_t groups) {
  return m < 0 || n < 0 || k < 1 || k > kMaxWidth || groups < 1 || k % groups;
}

}  // namespace

int linear(const Linear& p, cudaStream_t stream) {
  if (wrong(p.m, p.n, p.k, p.groups) || (p.raw && p.groups != 1)) return kInvalidValue;
  if (p.m == 0 || p.n == 0) return 0;
  if (hopper_wanted(p.m, p.n) && hopper_serves(p)) return hopper_gemm(p, stream);
  return gemm(p, gemm_tile(p.m, p.n, p.groups), stream);
}

int packed_linear(const PackedLinear& p, cudaStream_t stream) {
  if (wrong(p.m, p.n, p.k, p.groups)) return kInvalidValue;
  if (p.m == 0 || p.n == 0) return 0;
  if (packed_linear_fused(p)) return decode(p, stream);
  if (!p.codes || !p.divisor) return kInvalidValue;
  const bool few = decode_serves(p);
  if (const int error = quantize_interleaved(p, few ? Order::fields : Order::nibbles, stream)) return error;
  if (few) return decode(p, stream);
  if (hopper_wanted(p.m, p.n) && hopper_serves(p)) return hopper_packed_gemm(p, stream);
  return packed_gemm(p, gemm_tile(p.m, p.n, p.groups), stream);
}

}  // namespace qat::cuda
