// What the CPU ops share: torch's tensors and threads, through its stable ABI (torch 2.11 and later), for kernels that know
// neither. Only the files ops_*.{cpp,h} know torch.
//
// Legend: M tokens, N out_features, K in_features, G groups along K (see cpu/kernels.h for tiles and words).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace qat::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxWidth = 1 << 18;  // sums stay far from the ends of int32

inline Threads torch_threads() {
  return {torch::stable::get_num_threads(), [](int64_t parts, void (*work)(const void*, int64_t), const void* self) {
            torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) work(self, i);
            });
          }};
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// The C function, because torch::stable::empty goes through the dispatcher, which one token's arithmetic would notice.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = step;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline const float* floats(const Tensor& x, int64_t n, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == n,
                  what, " must be contiguous float32 of ", n, " elements");
  return static_cast<const float*>(x.const_data_ptr());
}

inline void check_width(int64_t k, int64_t groups) {
  STD_TORCH_CHECK(k >= 0 && k <= kMaxWidth && groups >= 1 && k % groups == 0, "unsupported K = ", k, " in ", groups, " groups");
}

inline int64_t tile_words(int64_t n, const Segments& s, bool base3) {
  return (n + kPanel - 1) / kPanel * s.count * s.words(base3);
}

// A linear's weights, checked; tokens, output and scratch are not set yet. `bias` may be null.
inline Linear with_weights(const Tensor& tiles, const Tensor& scale, const Tensor* bias, int64_t n, int64_t k, int64_t groups,
                           bool base3, double eps) {
  check_width(k, groups);
  STD_TORCH_CHECK(!base3 || isa().dot_base3, "tiles in base3 need another path than ", isa().name);
  Linear p = {};
  p.isa = &isa();
  p.n = n;
  p.k = k;
  p.segments = Segments::of(k, groups, base3);
  p.base3 = base3;
  STD_TORCH_CHECK(
      tiles.scalar_type() == ScalarType::Int && tiles.is_contiguous() && tiles.numel() == tile_words(n, p.segments, base3),
      "tiles do not fit [", n, ", ", k, "]");
  p.tiles = static_cast<const uint32_t*>(tiles.const_data_ptr());
  const int64_t scales = groups > 1 ? p.panels() * groups * kPanel : scale.numel() == 1 ? 1 : n;
  p.scale = floats(scale, scales, "scale");
  p.scale_per_row = scales != 1;
  p.bias = bias ? floats(*bias, n, "bias") : nullptr;
  p.eps = static_cast<float>(eps);
  p.absmax = -1.0f;
  return p;
}

// ops_cpu.cpp: weights as the kernels read them, of rows in memory; and a linear of x, which keeps the codes of x and their scales
// for a backward pass if it is told to.
Tensor make_tiles(const Tensor& rows, Source source, int64_t k, int64_t groups, bool base3);
struct __attribute__((visibility("hidden"))) Result {
  Tensor y, x_q, x_scale;
};
Result run(const Tensor& x, const Tensor& tiles, const Tensor& scale, const std::optional<Tensor>& bias, int64_t n, int64_t k,
           int64_t groups, bool base3, bool per_tensor, double eps, bool keep);

// ops_cpu_weights.cpp, of r rows [length]: means, or those of magnitudes; codes with a scale or, binary, a threshold a row; and the
// floats [r, length] of codes, with one scale a row or, `step` 0, for all.
void take_means(const Tensor& x, int64_t r, int64_t length, bool magnitudes, float* mean);
void take_codes(const float* rows, int64_t r, int64_t length, const float* value, bool binary, int8_t* t);
Tensor floats_of(const int8_t* codes, int64_t r, int64_t length, const float* scale, int64_t step, ScalarType type);

// ops_cpu_bits.cpp: codes [n, k] as 2 bits each, and the floats [n, k] that those are with scales [1 | n, groups].
Tensor cpu_pack_bits(const Tensor& t);
Tensor cpu_dequantize_bits(const Tensor& bits, int64_t k, const Tensor& scale, int64_t kind);

// ops_cpu_soft.cpp: soft weights and slopes of rows, and inputs rounded to their codes, which it says too.
std::tuple<Tensor, Tensor> cpu_soften(const Tensor& rows, const Tensor& levels, const Tensor& borders, double beta, int64_t kind);
std::tuple<Tensor, Tensor, Tensor> cpu_rounded(const Tensor& x, double eps);

}  // namespace qat::binding
