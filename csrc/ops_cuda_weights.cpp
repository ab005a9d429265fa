// Weights on a GPU as torch ops: their codes and scales, and the layouts that hold codes.
#include <optional>
#include <tuple>

#include "ops_cuda.h"

namespace qat::cuda::binding {
namespace {

// Codes int8 t [N, K], or their 2-bit bytes if `packed`, and the scale [1 | N, 1 | G], which is `given` for a reduction
// that the kernels do not have.
std::tuple<Tensor, Tensor> cuda_quantize_weight(const Tensor& w_any, int64_t granularity, int64_t reduce, int64_t groups,
                                                bool binary, int64_t scale_dtype, double eps,
                                                const std::optional<Tensor>& given, bool packed) {
  const Device device(w_any);
  STD_TORCH_CHECK(w_any.dim() == 2 && groups >= 1 && w_any.size(1) % groups == 0, "w must be [N, K] with K in ", groups,
                  " groups");
  STD_TORCH_CHECK((static_cast<Reduce>(reduce) == Reduce::given) == given.has_value(),
                  "a scale is given for Reduce::given alone");
  const Tensor w = rows_in_memory(w_any), workspace = device.empty({kWorkspaceBytes}, ScalarType::Byte);
  const int64_t n = w.size(0), k = w.size(1), rows = static_cast<Granularity>(granularity) == Granularity::tensor ? 1 : n;
  STD_TORCH_CHECK(!packed || groups == 1 || k / groups % 4 == 0, "groups of a packed weight must be multiples of 4");
  Tensor codes = packed ? device.empty({n, (k + 3) / 4}, ScalarType::Byte) : device.empty({n, k}, ScalarType::Char);
  Tensor scale = given ? *given : device.empty({rows, groups}, ScalarType::Float);
  device.check(scale, ScalarType::Float, "scale");
  STD_TORCH_CHECK(scale.numel() == rows * groups, "scale must be [1 | N, 1 | G]");
  QuantizeWeight p = {};
  p.w = w.const_data_ptr();
  p.dtype = dtype_of(w.scalar_type());
  p.n = n;
  p.k = k;
  p.groups = groups;
  p.granularity = static_cast<Granularity>(granularity);
  p.reduce = static_cast<Reduce>(reduce);
  p.binary = binary;
  p.scale_dtype = static_cast<Dtype>(scale_dtype);
  p.eps = static_cast<float>(eps);
  p.t = packed ? nullptr : static_cast<int8_t*>(codes.mutable_data_ptr());
  p.packed = packed ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr;
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  done(quantize_weight(p, device.stream), "quantize_weight");
  return {codes, scale};
}

// (soft codes, slopes) [R, L] in a dtype, of float32 rows [R, L] with levels [R, m], borders [R, m - 1] and beta [].
std::tuple<Tensor, Tensor> cuda_soften(const Tensor& rows, const Tensor& levels, const Tensor& borders, const Tensor& beta,
                                       int64_t kind) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const Device device(rows);
  device.check(rows, ScalarType::Float, "rows");
  device.check(levels, ScalarType::Float, "levels");
  device.check(borders, ScalarType::Float, "borders");
  device.check(beta, ScalarType::Float, "beta");
  const int64_t r = rows.size(0), length = rows.size(1), m = levels.size(1);
  STD_TORCH_CHECK(kind >= 0 && kind < 3 && levels.numel() == r * m && borders.numel() == r * (m - 1) && beta.numel() == 1,
                  "levels must be [R, m], borders [R, m - 1] and beta one value");
  Tensor soft = device.empty({r, length}, kTypes[kind]), slope = device.empty({r, length}, kTypes[kind]);
  const auto floats = [](const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); };
  done(soften_weight(floats(rows), r, length, floats(levels), floats(borders), m, floats(beta), static_cast<Dtype>(kind),
                     soft.mutable_data_ptr(), slope.mutable_data_ptr(), device.stream),
       "soften_weight");
  return {soft, slope};
}

// `bad`, int64 [1] holding -1, becomes the smallest flat index of what holds no ternary code.
uint64_t* first_bad(const Device& device, Tensor& bad) {
  device.check(bad, ScalarType::Long, "bad");
  STD_TORCH_CHECK(bad.numel() == 1, "bad must be [1]");
  return static_cast<uint64_t*>(bad.mutable_data_ptr());
}

Layout layout_of(bool base3) { return base3 ? Layout::base3 : Layout::bits; }

Tensor cuda_pack(const Tensor& t, bool base3, Tensor bad) {
  const Device device(t);
  device.check(t, ScalarType::Char, "t");
  const int64_t n = t.size(0), k = t.size(1), per_byte = base3 ? 5 : 4;
  Tensor packed = device.empty({n, (k + per_byte - 1) / per_byte}, ScalarType::Byte);
  done(pack(static_cast<const int8_t*>(t.const_data_ptr()), n, k, layout_of(base3),
                       static_cast<uint8_t*>(packed.mutable_data_ptr()), first_bad(device, bad), device.stream),
       "pack");
  return packed;
}

Tensor cuda_unpack(const Tensor& packed, int64_t k, bool base3, Tensor bad) {
  const Device device(packed);
  const uint8_t* bytes = bytes_of(device, packed, k, base3 ? 5 : 4);
  Tensor t = device.empty({packed.size(0), k}, ScalarType::Char);
  done(unpack(bytes, packed.size(0), k, layout_of(base3), static_cast<int8_t*>(t.mutable_data_ptr()),
                         first_bad(device, bad), device.stream),
       "unpack");
  return t;
}

// codes * scale [N, K] in `dtype`, of int8 or 2-bit codes and a scale [1 | N, 1 | G], or 1 without one.
Tensor cuda_dequantize(const Device& device, const Tensor& codes, int64_t k, const Tensor* scale, ScalarType dtype) {
  const bool bits = codes.scalar_type() == ScalarType::Byte;
  const int64_t n = codes.size(0), groups = scale ? scale->size(1) : 1;
  device.check(codes, bits ? ScalarType::Byte : ScalarType::Char, "codes");
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(1) == (bits ? (k + 3) / 4 : k), "codes do not fit K = ", k);
  if (scale) device.check(*scale, ScalarType::Float, "scale");
  STD_TORCH_CHECK(!scale || (scale->dim() == 2 && groups >= 1 && k % groups == 0 && (scale->size(0) == 1 || scale->size(0) == n)),
                  "scale must be [1 | N, 1 | G]");
  Tensor out = device.empty({n, k}, dtype);
  const auto* factor = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  done(dequantize(codes.const_data_ptr(), bits, n, k, groups, factor, scale && scale->size(0) > 1 ? groups : 0, dtype_of(dtype),
                  out.mutable_data_ptr(), device.stream),
       "dequantize");
  return out;
}

Tensor cuda_dequantize_bits(const Tensor& bits, int64_t k, const std::optional<Tensor>& scale, ScalarType dtype) {
  const Device device(bits);
  return cuda_dequantize(device, bits, k, scale ? &*scale : nullptr, dtype);
}

Tensor cuda_dequantize_codes(const Tensor& codes, const Tensor& scale, ScalarType dtype) {
  const Device device(codes);
  return cuda_dequantize(device, codes, codes.size(1), &scale, dtype);
}

Tensor cuda_repack(const Tensor& base3, int64_t k) {
  const Device device(base3);
  const uint8_t* bytes = bytes_of(device, base3, k, 5);
  Tensor bits = device.empty({base3.size(0), (k + 3) / 4}, ScalarType::Byte);
  done(repack(bytes, base3.size(0), k, static_cast<uint8_t*>(bits.mutable_data_ptr()), nullptr, device.stream),
       "repack");
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def(
      "cuda_quantize_weight(Tensor w, int granularity, int reduce, int groups, bool binary, int scale_dtype, float eps,"
      " Tensor? given, bool packed) -> (Tensor, Tensor)");
  m.def("cuda_soften(Tensor rows, Tensor levels, Tensor borders, Tensor beta, int kind) -> (Tensor, Tensor)");
  m.def("cuda_pack(Tensor t, bool base3, Tensor(a!) bad) -> Tensor");
  m.def("cuda_unpack(Tensor packed, int k, bool base3, Tensor(a!) bad) -> Tensor");
  m.def("cuda_dequantize_bits(Tensor bits, int k, Tensor? scale, ScalarType dtype) -> Tensor");
  m.def("cuda_dequantize_codes(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("cuda_repack(Tensor base3, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, QAT_DEVICE, m) {
  m.impl("cuda_quantize_weight", TORCH_BOX(&cuda_quantize_weight));
  m.impl("cuda_soften", TORCH_BOX(&cuda_soften));
  m.impl("cuda_pack", TORCH_BOX(&cuda_pack));
  m.impl("cuda_unpack", TORCH_BOX(&cuda_unpack));
  m.impl("cuda_dequantize_bits", TORCH_BOX(&cuda_dequantize_bits));
  m.impl("cuda_dequantize_codes", TORCH_BOX(&cuda_dequantize_codes));
  m.impl("cuda_repack", TORCH_BOX(&cuda_repack));
}

}  // namespace qat::cuda::binding
