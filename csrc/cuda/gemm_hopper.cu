// Many tokens on Hopper: y^T [N, M] = t [N, K] . x_q [M, K]^T by wgmma, t as int8 (training) or 2-bit bytes (inference).
//
// Floor at 2048 x 13824 x 2560: 92 us at the paper rate of int8. wgmma alone reaches that rate; mma.sync stays near 60 %.
// Design: weights are the left operand because that one may come from registers: a 2-bit weight is expanded there once for
// 256 tokens, 12 instructions beside 256 cycles of the tensor core. Activations are the right one, read by the tensor core
// from shared memory: 64 of its 128 bytes a cycle. A block has two warpgroups, 128 outputs x 256 tokens, and stages of 128
// codes by asynchronous copies: a stage is 1024 cycles of arithmetic, and two are under way (72 to 96 KB in flight an SM).
// A stage's products run while the next one's weights are expanded into other registers. Outputs are turned in shared memory
// and written by rows. One group of weights only, and 16-byte aligned rows; everything else takes gemm.cu. Not run on a GPU:
// none was there when this was written. The emulation proves indices, swizzle and waits as documented for the instruction, not
// the descriptor's bits and not the fence between memory proxies. Hence it is taken only where QAT_CUDA_WGMMA=1 asks for it,
// until it has been measured.
#include <cstdlib>

#include "codes.h"
#include "internal.h"
#include "wgmma.h"

namespace qat::cuda {
namespace {

constexpr int kOutputs = 128, kTokens = 256, kDepth = 128;  // of a block, and codes of a stage
constexpr int kThreads = 2 * kWarpgroup, kStages = 4;

struct Hopper {
  const uint8_t* weights;
  const int8_t* codes;
  int64_t weight_bytes, code_bytes;  // of a row
  const float* divisor;
  Output out;
  int64_t m, n;
  int stages;  // an even number: one of zeros may be the last
  bool raw, wide_y;
};

template <bool PACKED>
struct Stage {
  static constexpr int kRow = PACKED ? kDepth / 4 : kDepth;  // bytes of a weight row
  static constexpr int kTokenBytes = kTokens * kDepth, kBytes = kTokenBytes + kOutputs * kRow;
  static constexpr std::size_t kShared = static_cast<std::size_t>(kStages) * kBytes;
  static_assert(kBytes % 1024 == 0);
};

#if defined(QAT_WGMMA)  // for other targets the kernel is empty, and never launched

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kDepth + ((chunk ^ (row & 7)) * 16); }

template <bool PACKED>
__device__ __forceinline__ void fetch(const Hopper& p, unsigned char* stage, int64_t output0, int64_t token0, int index) {
  constexpr int kChunks = Stage<PACKED>::kRow / 16;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kTokens * 8; i += kThreads) {
    const int r = i / 8, c = i % 8;
    const int64_t token = token0 + r, byte = int64_t{index} * kDepth + c * 16;
    const bool valid = token < p.m && byte < p.code_bytes;
    copy_async(stage + swizzled(r, c), p.codes + (valid ? token * p.code_bytes + byte : 0), valid);
  }
  unsigned char* weights = stage + Stage<PACKED>::kTokenBytes;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kOutputs * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks;
    const int64_t output = output0 + r, byte = int64_t{index} * Stage<PACKED>::kRow + c * 16;
    const bool valid = output < p.n && byte < p.weight_bytes;
    // Bits: rows of 32 bytes, their halves exchanged in every other block of 4 rows, so that 8 rows' words lie in 32 banks.
    unsigned char* to = weights + (PACKED ? r * 32 + ((c ^ (r >> 2 & 1)) * 16) : swizzled(r, c));
    copy_async(to, p.weights + (valid ? output * p.weight_bytes + byte : 0), valid);
  }
}

// A warp's 16 rows of weights for 32 codes, number s of the stage.
template <bool PACKED>
__device__ __forceinline__ void take_weights(const unsigned char* weights, int row, int s, int lane, uint32_t (&a)[4]) {
  if constexpr (PACKED) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + half * 8 + lane / 4;
      const auto* words = reinterpret_cast<const uint32_t*>(weights + r * 32 + (((s >> 1) ^ (r >> 2 & 1)) * 16) + (s & 1) * 8);
      a[half] = expand_one(words[0], lane % 4);
      a[2 + half] = expand_one(words[1], lane % 4);
    }
  } else {
    load_matrices(a, weights + swizzled(row + lane % 16, s * 2 + lane / 16));
  }
}

// A warp's weights of a whole stage, once its copies are there.
template <bool PACKED>
__device__ __forceinline__ void take_stage(const unsigned char* shared, int it, int row, int lane, uint32_t (&a)[4][4]) {
#pragma unroll
  for (int s = 0; s < 4; ++s)
    take_weights<PACKED>(shared + it % kStages * Stage<PACKED>::kBytes + Stage<PACKED>::kTokenBytes, row, s, lane, a[s]);
}

// One stage's products, and while they are under way the next one's weights into `next`.
template <bool PACKED>
__device__ __forceinline__ void step(const Hopper& p, unsigned char* shared, int64_t output0, int64_t token0, int row, int lane,
                                     int it, const uint32_t (&a)[4][4], uint32_t (&next)[4][4], int32_t (&low)[16][4],
                                     int32_t (&high)[16][4]) {
  using S = Stage<PACKED>;
  const unsigned char* stage = shared + it % kStages * S::kBytes;
  fence_products();
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    product_s8(low, a[s], stage + s * 32);
    product_s8(high, a[s], stage + kTokens / 2 * kDepth + s * 32);
  }
  commit_products();
  wait_copies<kStages - 3>();
  fence_copies();
  __syncthreads();  // all threads' copies of the next stage are there, and the products of the stage before are done
  const int later = it + kStages - 1;
  if (later < p.stages) fetch<PACKED>(p, shared + later % kStages * S::kBytes, output0, token0, later);
  commit_copies();
  take_stage<PACKED>(shared, it + 1, row, lane, next);
  wait_products<0>();
}

// Where y of a token and output lies in shared memory before it is written: rows of 128 outputs and 16 bytes.
__device__ __forceinline__ int turned(int token, int output, int size) {
  return token * (kOutputs * size + 16) + output * size;
}

// The block's y through shared memory, whose stages are no longer needed; `half` of the tokens at a time, as floats are long.
__device__ __forceinline__ void write(const Hopper& p, unsigned char* shared, int64_t output0, int64_t token0, int output,
                                      int lane, int32_t (&acc)[16][4]) {
  const int size = p.raw || p.out.dtype == Dtype::f32 ? 4 : 2;
  float inverse[2] = {}, bias[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = output0 + output + h * 8;
    if (p.raw || row >= p.n) continue;
    inverse[h] = reciprocal(p.out.scale[row * p.out.scale_stride]);
    if (p.out.bias) bias[h] = p.out.bias[row];
  }
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = j * 8 + lane % 4 * 2 + e % 2, h = e / 2;
      unsigned char* to = shared + turned(token, output + h * 8, size);
      if (p.raw) {
        *reinterpret_cast<int32_t*>(to) = acc[j][e];
      } else if (token0 + token < p.m) {
        float y = rescale(acc[j][e], p.divisor[token0 + token], inverse[h]);
        if (p.out.bias) y = add(y, bias[h]);
        store_element(to, p.out.dtype, 0, y);
      }
    }
  __syncthreads();
  const int per_chunk = 16 / size, chunks = kOutputs / per_chunk;
  for (int i = static_cast<int>(threadIdx.x); i < kTokens / 2 * chunks; i += kThreads) {
    const int token = i / chunks, first = i % chunks * per_chunk;
    if (token0 + token >= p.m) break;
    const unsigned char* from = shared + turned(token, first, size);
    unsigned char* y = static_cast<unsigned char*>(p.out.y) + ((token0 + token) * p.n + output0 + first) * size;
    if (p.wide_y && output0 + first < p.n) {
      *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int b = 0; b < 16 && output0 + first + b / size < p.n; b += 2)
        *reinterpret_cast<uint16_t*>(y + b) = *reinterpret_cast<const uint16_t*>(from + b);
    }
  }
}

#endif

template <bool PACKED>
__global__ void __launch_bounds__(kThreads, 1) hopper_kernel(const Hopper p) {
#if defined(QAT_WGMMA)
  using S = Stage<PACKED>;
  unsigned char* shared = shared_memory();
  const int64_t token_tiles = ceil_div<int64_t>(p.m, kTokens);
  const int64_t output0 = blockIdx.x / token_tiles * kOutputs, token0 = blockIdx.x % token_tiles * kTokens;
  const int lane = threadIdx.x % kWarp, row = static_cast<int>(threadIdx.x) / kWarp * 16;  // 16 rows a warp, 64 a warpgroup
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < p.stages) fetch<PACKED>(p, shared + s * S::kBytes, output0, token0, s);
    commit_copies();
  }
  wait_copies<kStages - 2>();
  fence_copies();
  __syncthreads();

  int32_t low[16][4] = {}, high[16][4] = {};  // tokens 0..127 and 128..255
  uint32_t even[4][4], odd[4][4];
  take_stage<PACKED>(shared, 0, row, lane, even);
  for (int it = 0; it < p.stages; it += 2) {
    step<PACKED>(p, shared, output0, token0, row, lane, it, even, odd, low, high);
    step<PACKED>(p, shared, output0, token0, row, lane, it + 1, odd, even, low, high);
  }
  __syncthreads();
  write(p, shared, output0, token0, row + lane / 4, lane, low);
  __syncthreads();
  write(p, shared, output0, token0 + kTokens / 2, row + lane / 4, lane, high);
#endif
}

template <bool PACKED>
int run(const Hopper& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.m, kTokens) * ceil_div<int64_t>(p.n, kOutputs);
  return launch(hopper_kernel<PACKED>, {static_cast<unsigned>(blocks)}, kThreads, Stage<PACKED>::kShared, stream, p);
}

Hopper problem(const Output& out, const float* divisor, int64_t m, int64_t n, bool raw) {
  Hopper p = {};
  p.out = out;
  p.divisor = divisor;
  p.m = m;
  p.n = n;
  p.raw = raw;
  if (raw) p.out.bias = nullptr;
  const int64_t size = raw ? 4 : size_of(out.dtype);
  p.wide_y = aligned(out.y, 16) && n * size % 16 == 0;
  return p;
}

}  // namespace

// Blocks for at least three quarters of 132 SMs, on a device and in a shape that it serves.
bool hopper_wanted(int64_t m, int64_t n) {
  const char* asked = std::getenv("QAT_CUDA_WGMMA");
  return asked && asked[0] == '1' && ceil_div<int64_t>(m, kTokens) * ceil_div<int64_t>(n, kOutputs) >= 100 &&
         compute_capability() == 90;
}

bool hopper_serves(const Linear& p) { return p.groups == 1 && p.k % 16 == 0 && aligned(p.codes, 16) && aligned(p.t, 16); }

bool hopper_serves(const PackedLinear& p) {
  return p.groups == 1 && ceil_div<int64_t>(p.k, 4) % 16 == 0 && aligned(p.packed, 16);
}

int hopper_gemm(const Linear& p, cudaStream_t stream) {
  Hopper h = problem(p.out, p.divisor, p.m, p.n, p.raw);
  h.weights = reinterpret_cast<const uint8_t*>(p.t);
  h.codes = p.codes;
  h.weight_bytes = h.code_bytes = p.k;
  h.stages = static_cast<int>(ceil_div<int64_t>(p.k, 2 * kDepth)) * 2;
  return run<false>(h, stream);
}

int hopper_packed_gemm(const PackedLinear& p, cudaStream_t stream) {
  Hopper h = problem(p.out, p.divisor, p.m, p.n, false);
  h.weights = p.packed;
  h.codes = p.codes;
  h.weight_bytes = ceil_div<int64_t>(p.k, 4);
  h.code_bytes = padded_width(p.k, 1);
  h.stages = static_cast<int>(ceil_div<int64_t>(p.k, 2 * kDepth)) * 2;
  return run<true>(h, stream);
}

}  // namespace qat::cuda
