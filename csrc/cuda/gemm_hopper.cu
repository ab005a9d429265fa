// Many tokens on Hopper: y^T [N, M] = t [N, K] . x_q [M, K]^T by wgmma, t as int8 (training) or 2-bit bytes (inference).
//
// Floor at 2048 x 13824 x 2560: 92 us at the paper rate of int8. wgmma alone reaches that rate; mma.sync stays near 60 %.
// Design: weights are the left operand because that one may come from registers: a 2-bit weight is expanded there once for
// 256 tokens, 12 instructions beside 256 cycles of the tensor core. Activations are the right one, read by the tensor core
// from shared memory: 64 of its 128 bytes a cycle. A block has two warpgroups, 128 outputs x 256 tokens, and stages of 128
// codes by asynchronous copies: a stage is 1024 cycles of arithmetic, and two are under way (72 to 96 KB in flight an SM).
// A stage's weights are expanded while the products of the one before run, which are waited for only when its own are under way:
// so the compiler cannot put the expansion behind the wait. Addresses are made once: stages are unrolled, and a matrix descriptor
// is the first one and a constant. Sums are turned in shared memory and written by tokens (outputs.h).
// One group of weights only, and 16-byte aligned rows; everything else takes gemm.cu. Not run on a GPU: none was there when this
// was written. The emulation proves indices, swizzle, waits and the fence between memory proxies as documented for the
// instruction, not the descriptor's bits. Hence it is taken only where QAT_CUDA_WGMMA=1 asks for it, until it has been measured.
#include <cstdlib>

#include "internal.h"
#include "operands.h"
#include "outputs.h"
#include "split.h"
#include "wgmma.h"

namespace qat::cuda {
namespace {

constexpr int kOutputs = 128, kTokens = 256, kCodes = 128;  // of a block, and codes of a stage
constexpr int kThreads = 2 * kWarpgroup, kStages = 4;

struct Hopper {
  const uint8_t* weights;
  const uint8_t* codes;
  int64_t weight_bytes, code_bytes;  // of a row
  int64_t outputs;                   // rows of weights: a split's target has whole units of them
  Target target;
  int stages, split_stages;  // in all, and of a block: K is split as in gemm.cu
};

using Rows = SumRows<kOutputs, 16>;  // of the block's tokens, in the place of the stages

template <bool PACKED>
struct Stage {
  static constexpr int kRow = PACKED ? kCodes / 4 : kCodes;  // bytes of a weight row
  static constexpr int kTokenBytes = kTokens * kCodes, kBytes = kTokenBytes + kOutputs * kRow;
  static constexpr std::size_t kShared = static_cast<std::size_t>(kStages) * kBytes;
  static_assert(kBytes % 1024 == 0 && kTokens * Rows::kPitch <= kShared);
};

#if defined(QAT_WGMMA)  // for other targets the kernel is empty, and never launched

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kCodes + ((chunk ^ (row & 7)) * 16); }

// Bits: rows of 32 bytes, their halves exchanged in every other block of 4 rows, so that 8 rows' words lie in 32 banks.
__device__ __forceinline__ int halved(int row, int half) { return row * 32 + ((half ^ (row >> 2 & 1)) * 16); }

template <bool PACKED>
struct Fetcher {
  Copies<kTokens, 8, kThreads> tokens;
  Copies<kOutputs, PACKED ? 2 : 8, kThreads> weights;
  int token_to, weight_to;

  __device__ __forceinline__ Fetcher(const Hopper& p, int64_t output0, int64_t token0)
      : tokens(p.codes, p.target.m, p.code_bytes, static_cast<int>(p.code_bytes), token0),
        weights(p.weights, p.outputs, p.weight_bytes, static_cast<int>(p.weight_bytes), output0) {
    token_to = swizzled(tokens.row(), tokens.chunk());
    weight_to = Stage<PACKED>::kTokenBytes + (PACKED ? halved(weights.row(), weights.chunk())
                                                     : swizzled(weights.row(), weights.chunk()));
  }
  __device__ __forceinline__ void skip(int stages) {
    tokens.skip(stages);
    weights.skip(stages);
  }
  __device__ __forceinline__ void fetch(unsigned char* stage) {
    tokens.fetch(stage + token_to);
    weights.fetch(stage + weight_to);
  }
};

// Where a lane finds its weights in a stage: of 32 codes each, or of 64.
template <bool PACKED>
struct Lane {
  int at[PACKED ? 2 : 4];

  __device__ __forceinline__ Lane(int row, int lane) {
#pragma unroll
    for (int i = 0; i < (PACKED ? 2 : 4); ++i)
      at[i] = Stage<PACKED>::kTokenBytes + (PACKED ? halved(row + lane / 4, i) + lane % 4 * 4
                                                   : swizzled(row + lane % 16, i * 2 + lane / 16));
  }

  // A warp's 16 rows of a whole stage, once its copies are there: a[s] for 32 codes.
  __device__ __forceinline__ void take(const unsigned char* stage, uint32_t (&a)[4][4]) const {
    if constexpr (PACKED) {
#pragma unroll
      for (int block = 0; block < 2; ++block)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t out[4];
          expand_word(load_shared<uint32_t>(stage + at[block] + half * 8 * 32), out);
#pragma unroll
          for (int i = 0; i < 4; ++i) a[block * 2 + i / 2][i % 2 * 2 + half] = out[i];
        }
    } else {
#pragma unroll
      for (int s = 0; s < 4; ++s) load_matrices(a[s], stage + at[s]);
    }
  }
};

// The warp's sums of 128 tokens from `token` on into shared memory, turned.
__device__ __forceinline__ void turn(unsigned char* rows, int token, int output, int lane, const int32_t (&acc)[16][4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = token + lane % 4 * 2 + e % 2, column = output + lane / 4 + e / 2 * 8;
    unsigned char* to = rows + Rows::place(row, column / 4) + column % 4 * 4;
#pragma unroll
    for (int j = 0; j < 16; ++j) store_shared(to + j * 8 * Rows::kPitch, acc[j][e]);
  }
}

#endif

template <bool PACKED>
__global__ void __launch_bounds__(kThreads, 1) hopper_kernel(const Hopper p) {
#if defined(QAT_WGMMA)
  using S = Stage<PACKED>;
  unsigned char* shared = shared_memory();
  const auto token_tiles = static_cast<unsigned>(ceil_div<int64_t>(p.target.m, kTokens));
  const int64_t output0 = int64_t{blockIdx.x / token_tiles} * kOutputs, token0 = int64_t{blockIdx.x % token_tiles} * kTokens;
  const int lane = threadIdx.x % kWarp, row = static_cast<int>(threadIdx.x) / kWarp * 16;  // 16 rows a warp, 64 a warpgroup
  Fetcher<PACKED> fetcher(p, output0, token0);
  const int before = static_cast<int>(blockIdx.y) * p.split_stages;
  int stages = p.stages - before < p.split_stages ? p.stages - before : p.split_stages;
  fetcher.skip(before);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (s < stages) fetcher.fetch(shared + s * S::kBytes);
    commit_copies();
  }

  const Lane<PACKED> mine(row, lane);
  const Matrix tokens = matrix_at(shared);
  int32_t low[16][4] = {}, high[16][4] = {};  // tokens 0..127 and 128..255
  uint32_t a[2][4][4];
  for (; stages > 0; stages -= kStages) {
#pragma unroll
    for (int slot = 0; slot < kStages; ++slot) {
      if (stages <= slot) break;
      wait_copies<1>();
      fence_copies();
      __syncthreads();  // all threads' copies of this stage are there, and the products of the last but one are done
      if (stages > slot + 2) fetcher.fetch(shared + (slot + 2) % kStages * S::kBytes);
      commit_copies();
      mine.take(shared + slot * S::kBytes, a[slot % 2]);
      fence_products();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        product_s8(low, a[slot % 2][s], moved(tokens, slot * S::kBytes + s * 32));
        product_s8(high, a[slot % 2][s], moved(tokens, slot * S::kBytes + kTokens / 2 * kCodes + s * 32));
      }
      commit_products();
      wait_products<1>();  // those of the stage before
    }
  }
  wait_products<0>();
  if (gridDim.y > 1) let_next_start();
  __syncthreads();
  turn(shared, 0, row, lane, low);
  turn(shared, kTokens / 2, row, lane, high);
  __syncthreads();
  const int unit = static_cast<int>(threadIdx.x) % Rows::kUnits, first = static_cast<int>(threadIdx.x) / Rows::kUnits;
  const Factors<false> factors(p.target, output0 + unit * kUnit);
  write_rows<Rows>(p.target, factors, shared, unit, first, kThreads / Rows::kUnits, kTokens, token0);
#endif
}

template <bool PACKED>
int run(Hopper p, int wanted, int32_t* partial, cudaStream_t stream) {
  const Target whole = p.target;
  const Splits splits = splits_of(whole, p.stages, wanted, partial);
  p.target = splits.target;
  p.split_stages = splits.stages;
  const int64_t blocks = ceil_div<int64_t>(p.target.m, kTokens) * ceil_div<int64_t>(p.target.n, kOutputs);
  const dim3 grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(splits.count)};
  const int error = launch(hopper_kernel<PACKED>, grid, kThreads, Stage<PACKED>::kShared, stream, p);
  return error ? error : add_splits(splits, whole, stream);
}

int stages_of(int64_t k) { return static_cast<int>(ceil_div<int64_t>(k, kCodes)); }

}  // namespace

// On a device that has it.
bool hopper_wanted() {
  const char* asked = std::getenv("QAT_CUDA_WGMMA");
  return asked && asked[0] == '1' && compute_capability() == 90;
}

bool hopper_serves(const Linear& p) { return p.groups == 1 && p.k % 16 == 0 && aligned(p.codes, 16) && aligned(p.t, 16); }

bool hopper_serves(const PackedLinear& p) {
  return p.groups == 1 && ceil_div<int64_t>(p.k, 4) % 16 == 0 && aligned(p.packed, 16);
}

int hopper_gemm(const Linear& p, int splits, cudaStream_t stream) {
  const Target target = target_of(p.out, p.divisor, p.m, p.n, p.raw);
  const auto *weights = reinterpret_cast<const uint8_t*>(p.t), *codes = reinterpret_cast<const uint8_t*>(p.codes);
  return run<false>({weights, codes, p.k, p.k, p.n, target, stages_of(p.k), 0}, splits, p.partial, stream);
}

int hopper_packed_gemm(const PackedLinear& p, int splits, cudaStream_t stream) {
  const Target target = target_of(p.out, p.divisor, p.m, p.n, false);
  const auto* codes = reinterpret_cast<const uint8_t*>(p.codes);
  const int64_t weight_bytes = ceil_div<int64_t>(p.k, 4), code_bytes = padded_width(p.k, 1);
  return run<true>({p.packed, codes, weight_bytes, code_bytes, p.n, target, stages_of(p.k), 0}, splits, p.partial, stream);
}

}  // namespace qat::cuda
