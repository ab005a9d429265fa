// Codes t in {-1, 0, 1} as 2 bits each, four a byte (the layout `2bit` of qat/quantizers/packing.py), which is how a training
// layer keeps them between its passes, and the floats that they stand for, without the int8 codes between.
#include <cstring>

#include "ops_cpu.h"

namespace qat::binding {
namespace {

constexpr int64_t kSlice = 1024;  // codes that are worked on at once; a multiple of 4

// The four codes of every byte.
struct Table {
  int8_t codes[256][4];
  constexpr Table() : codes() {
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0; i < 4; ++i) codes[byte][i] = static_cast<int8_t>((byte >> (2 * i) & 3) - 1);
  }
};
constexpr Table kTable;

// The first `count` codes of a row that begins at a whole byte; `out` has room for the last byte's four.
void unpack(const uint8_t* bits, int64_t count, int8_t* out) {
  for (int64_t i = 0; i < (count + 3) / 4; ++i) std::memcpy(out + 4 * i, kTable.codes[bits[i]], 4);
}

uint8_t byte_of(const int8_t* t) {
  return static_cast<uint8_t>((t[0] + 1) | (t[1] + 1) << 2 | (t[2] + 1) << 4 | (t[3] + 1) << 6);
}

void pack(const int8_t* t, int64_t k, uint8_t* out) {
  int64_t i = 0;
  for (; i + 4 <= k; i += 4) *out++ = byte_of(t + i);
  if (i == k) return;
  int8_t last[4] = {};  // padding is the zero weight
  std::memcpy(last, t + i, static_cast<size_t>(k - i));
  *out = byte_of(last);
}

}  // namespace

Tensor cpu_pack_bits(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == ScalarType::Char && t.is_contiguous(), "t must be contiguous int8 [N, K]");
  const int64_t n = t.size(0), k = t.size(1), bytes = (k + 3) / 4;
  Tensor bits = empty({n, bytes}, ScalarType::Byte);
  const auto* in = static_cast<const int8_t*>(t.const_data_ptr());
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  torch::stable::parallel_for(0, n, grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(in + i * k, k, out + i * bytes);
  });
  return bits;
}

namespace {

const uint8_t* rows_of_bits(const Tensor& bits, int64_t k) {
  STD_TORCH_CHECK(bits.dim() == 2 && bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() && bits.size(1) == (k + 3) / 4,
                  "bits must be contiguous uint8 [N, ceil(K / 4)]");
  return static_cast<const uint8_t*>(bits.const_data_ptr());
}

Tensor cpu_unpack_bits(const Tensor& bits, int64_t k) {
  const auto* in = rows_of_bits(bits, k);
  const int64_t n = bits.size(0), bytes = bits.size(1);
  Tensor t = empty({n, k}, ScalarType::Char);
  auto* out = static_cast<int8_t*>(t.mutable_data_ptr());
  torch::stable::parallel_for(0, n, grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      unpack(in + i * bytes, k / 4 * 4, out + i * k);
      if (k % 4) std::memcpy(out + i * k + k / 4 * 4, kTable.codes[in[(i + 1) * bytes - 1]], static_cast<size_t>(k % 4));
    }
  });
  return t;
}

// Codes [first, first + count) of a row, each times the scale of its group of `length`.
void dequantize(const int8_t* t, int64_t first, int64_t count, const float* scale, int64_t length, float* out) {
  for (int64_t i = first; i < first + count;) {
    const int64_t end = (i / length + 1) * length, stop = end < first + count ? end : first + count;
    isa().dequantize(t + (i - first), stop - i, scale[i / length], out + (i - first));
    i = stop;
  }
}

}  // namespace

// Floats codes * scale [N, K] of bits, with scale [1 | N, G]: float32 (0), bfloat16 (1) or float16 (2).
Tensor cpu_dequantize_bits(const Tensor& bits, int64_t k, const Tensor& scale, int64_t kind) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const auto* in = rows_of_bits(bits, k);
  const int64_t n = bits.size(0), bytes = bits.size(1), slices = (k + kSlice - 1) / kSlice;
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) > 0 && k % scale.size(1) == 0 && (scale.size(0) == 1 || scale.size(0) == n) &&
                      kind >= 0 && kind < 3,
                  "wrong scale or kind");
  const int64_t groups = scale.size(1), step = scale.size(0) == 1 ? 0 : groups;
  const float* scales = floats(scale, scale.size(0) * groups, "scale");
  Tensor out = empty({n, k}, kTypes[kind]);
  const Dtype dtype = dtype_of(out);
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = dtype == Dtype::f32 ? 4 : 2;
  torch::stable::parallel_for(0, n * slices, grain(kSlice), [&](int64_t begin, int64_t end) {
    int8_t t[kSlice];
    float values[kSlice];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / slices, first = i % slices * kSlice, count = k - first < kSlice ? k - first : kSlice;
      const int64_t at = row * k + first;
      float* target = size == 4 ? reinterpret_cast<float*>(to) + at : values;
      unpack(in + row * bytes + first / 4, count, t);
      dequantize(t, first, count, scales + row * step, k / groups, target);
      if (size == 2) isa().from_float(values, count, dtype, to + at * size);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cpu_pack_bits(Tensor t) -> Tensor");
  m.def("cpu_unpack_bits(Tensor bits, int k) -> Tensor");
  m.def("cpu_dequantize_bits(Tensor bits, int k, Tensor scale, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_pack_bits", TORCH_BOX(&cpu_pack_bits));
  m.impl("cpu_unpack_bits", TORCH_BOX(&cpu_unpack_bits));
  m.impl("cpu_dequantize_bits", TORCH_BOX(&cpu_dequantize_bits));
}

}  // namespace qat::binding
