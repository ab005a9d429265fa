// The CUDA kernels' interface: raw pointers and a stream, no torch and no CUDA header, so that any C++ file includes it.
//
// Legend: M tokens, N out_features, K in_features, G groups along K, L = K / G.
//
// Every launcher returns a cudaError_t as an int (0 is success). It allocates nothing, never waits for the device, takes
// grids from shapes alone and so can be captured into a CUDA graph; the caller sets the device. Pointers are device
// pointers. All matrices are contiguous rows. Any shape and any alignment is served; what is 16-byte aligned (K a multiple
// of 16 codes in int8, of 64 in 2bit, and aligned base pointers) is read 16 bytes at a time. K <= kMaxWidth. Where a size is
// 0 nothing is launched, but a linear of K = 0 is refused. A wrong size gives cudaErrorInvalidValue (1).
//
// The arithmetic is qat/ops/reference.py's, operation by operation, each rounded once to float32 (no contraction):
//     divisor = (1 / max(max|x|, eps)) * 127        x_q = clamp(rint(x * divisor), -128, 127)
//     G = 1:  y = acc / (divisor * (1 / scale)) + bias
//     G > 1:  y = sum_g(acc_g * scale_g) / divisor + bias, g ascending from 0.0f; then y is rounded to its dtype
// acc is exact in int32. A NaN in a token makes its divisor NaN, and so its outputs.
#pragma once
#include <cstddef>
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as cuda_runtime_api.h has it

namespace qat::cuda {

enum class Dtype : int32_t { f32, bf16, f16 };
enum class Layout : int32_t { bits, base3 };  // `2bit` and `base3` of qat/quantizers/packing.py
enum class Granularity : int32_t { tensor, channel, group };
enum class Reduce : int32_t { absmean, absmax, given };  // given: `scale` is read, not written (absmedian comes from torch)

constexpr int64_t kMaxWidth = 1 << 18;       // sums stay far from the ends of int32
constexpr int64_t kWorkspaceBytes = 16384;   // what every `workspace` below needs, 16-byte aligned; contents do not matter

struct QuantizeActivation {
  const void* x;            // [M, K]
  Dtype dtype;              // of x and norm_weight
  int64_t m, k;
  bool per_tensor;          // one scale for all tokens (two reads of x); else each token its own (one read)
  float eps;                // lower bound of max|x|
  const void* norm_weight;  // [K]: quantize rms_norm(x) * weight instead of x; or null. Both products are rounded to dtype
  float norm_eps;
  int8_t* codes;            // [M, K]
  float* divisor;           // [M], or null
  float* scale;             // [M] = 1 / divisor, or null
  void* workspace;          // needed if per_tensor
};
int quantize_activation(const QuantizeActivation& p, cudaStream_t stream);

// t and scale of a latent weight, and its 2-bit bytes: two reads of w for one scale a tensor, else one.
// absmean: |w| summed in a fixed order, in double; max(., eps), then rounded to scale_dtype within its normal range.
struct QuantizeWeight {
  const void* w;            // [N, K]
  Dtype dtype;
  int64_t n, k, groups;     // groups: G > 1 only if granularity is group
  Granularity granularity;
  Reduce reduce;
  bool binary;              // t = w > mean(w) ? 1 : -1, the mean of what shares a scale; else t = clip(rint(w / scale), -1, 1)
  Dtype scale_dtype;
  float eps;
  int8_t* t;                // [N, K], or null
  uint8_t* packed;          // [N, ceil(K / 4)] in layout `bits`, or null; needs t too where L % 4 != 0 and G > 1
  float* scale;             // [1], [N] or [N, G]
  void* workspace;
};
int quantize_weight(const QuantizeWeight& p, cudaStream_t stream);

// Soft codes and their slopes [R, L] in `dtype`, of rows [R, L] with levels [R, m] in ascending order and borders [R, m - 1];
// beta [1] is on the device (qat/quantizers/soft.py). Within 4e-7 of a row's largest level, slopes within 5e-7 of beta.
int soften_weight(const float* w, int64_t rows, int64_t length, const float* levels, const float* borders, int64_t m,
                  const float* beta, Dtype dtype, void* soft, void* slope, cudaStream_t stream);

// int8 t [N, K] <-> bytes [N, ceil(K / 4)] or [N, ceil(K / 5)], padded with code 1. `bad`, if not null, is lowered to the
// smallest flat index of an element (pack) or byte (unpack, repack) that holds no ternary code; the caller fills it with
// all ones before. A bad element or byte gives an unspecified code.
int pack(const int8_t* t, int64_t n, int64_t k, Layout layout, uint8_t* packed, uint64_t* bad, cudaStream_t stream);
int unpack(const uint8_t* packed, int64_t n, int64_t k, Layout layout, int8_t* t, uint64_t* bad, cudaStream_t stream);
// base3 bytes -> 2-bit bytes: the linear kernels read 2bit only, so base-3 weights are repacked once and kept.
int repack(const uint8_t* base3, int64_t n, int64_t k, uint8_t* bits, uint64_t* bad, cudaStream_t stream);

// codes * scale [N, K] in `dtype`, the product rounded to float32 first, of int8 codes [N, K] or (`bits`) 2-bit bytes
// [N, ceil(K / 4)]: element (n, g) of the scale is scale[n * scale_stride + g]; null: 1. Each byte is read and written once.
int dequantize(const void* codes, bool bits, int64_t n, int64_t k, int64_t groups, const float* scale, int64_t scale_stride,
               Dtype dtype, void* out, cudaStream_t stream);

// What becomes of the sums: y = acc, rescaled.
struct Output {
  void* y;                  // [M, N] in dtype
  Dtype dtype;
  const float* scale;       // multiplies. Element (n, g) is scale[n * scale_stride + g]
  int64_t scale_stride;     // 0 (one row for all outputs: [1] or [1, G]) or G
  const float* bias;        // [N], or null
};

// The training forward, from what quantize_activation and quantize_weight gave.
// Many tokens take wgmma on sm_90 only where QAT_CUDA_WGMMA=1 is set (gemm_hopper.cu says why), else mma.sync everywhere.
struct Linear {
  const int8_t* codes;      // [M, K], x_q
  const float* divisor;     // [M]
  const int8_t* t;          // [N, K]
  int64_t m, n, k, groups;
  Output out;
  bool raw;                 // y is int32 [M, N] = acc: G = 1, and divisor, scale and bias are not read
  int32_t* partial;         // scratch of partial_bytes, 16-byte aligned; null: K is not split, whatever the shape
};
int64_t partial_bytes(const Linear& p);  // from m, n, k, groups and the device; 0 where K is not split
int linear(const Linear& p, cudaStream_t stream);

// Inference: quantize and multiply with 2-bit weights. One token takes one launch, in which each block quantizes x itself.
struct PackedLinear {
  const void* x;            // [M, K] in out.dtype
  bool per_tensor;
  float eps;
  const uint8_t* packed;    // [N, ceil(K / 4)] in layout `bits`
  int64_t m, n, k, groups;
  Output out;
  int8_t* codes;            // scratch [M, padded_width(K, G)], 16-byte aligned; null where packed_linear_fused
  float* divisor;           // scratch [M]; null where packed_linear_fused
  void* workspace;          // needed if per_tensor and not packed_linear_fused
  int32_t* partial;         // as of Linear
  bool overlap;             // on sm_90 and later a launch for one token may start before the kernel ahead of it on the stream
                            // has ended (programmatic launch); it reads and writes nothing of other kernels before that
};
int packed_linear(const PackedLinear& p, cudaStream_t stream);
int64_t partial_bytes(const PackedLinear& p);
bool packed_linear_fused(const PackedLinear& p);  // from m, n, k, groups, and the alignment of packed

// K with every group padded to blocks of 64 codes.
constexpr int64_t padded_width(int64_t k, int64_t groups) { return groups * ((k / groups + 63) / 64 * 64); }

}  // namespace qat::cuda
