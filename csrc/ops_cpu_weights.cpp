// What a latent weight is quantized by as torch ops: means, codes, and the floats that codes stand for.
#include "ops_cpu.h"

namespace qat::binding {
namespace {

constexpr int64_t kSlice = 4096;  // elements that are worked on at once, so that a single long row has work for all threads

int64_t slices_of(int64_t length) { return (length + kSlice - 1) / kSlice; }

// The double that `sum` gives of each slice of r rows [length] of x.
void sum_slices(const Tensor& x, int64_t r, int64_t length, double (*sum)(const float*, int64_t), double* parts) {
  const Dtype dtype = dtype_of(x);
  const auto* in = static_cast<const char*>(x.const_data_ptr());
  const int64_t size = x.element_size(), slices = slices_of(length);
  torch::stable::parallel_for(0, r * slices, grain(length < kSlice ? length : kSlice), [&](int64_t begin, int64_t end) {
    float floats[kSlice];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % slices * kSlice, count = length - first < kSlice ? length - first : kSlice;
      const char* from = in + (i / slices * length + first) * size;
      if (dtype != Dtype::f32) isa().to_float(from, dtype, count, floats);
      parts[i] = sum(dtype == Dtype::f32 ? reinterpret_cast<const float*>(from) : floats, count);
    }
  });
}

double total(const double* parts, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += parts[i];
  return sum;
}

}  // namespace

// Summed in double: by slices, and then over the slices in their order, so that it is the same for any number of threads.
void take_means(const Tensor& x, int64_t r, int64_t length, bool magnitudes, float* mean) {
  const int64_t slices = slices_of(length);
  const Scratch<double> parts(r * slices);
  sum_slices(x, r, length, magnitudes ? isa().magnitudes : isa().sum, parts.get());
  for (int64_t row = 0; row < r; ++row)
    mean[row] = static_cast<float>(total(parts.get() + row * slices, slices) / static_cast<double>(length));
}

void take_codes(const float* rows, int64_t r, int64_t length, const float* value, bool binary, int8_t* t) {
  const auto codes = binary ? isa().binary : isa().ternary;
  const int64_t slices = slices_of(length);
  torch::stable::parallel_for(0, r * slices, grain(length < kSlice ? length : kSlice), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / slices, first = i % slices * kSlice, count = length - first < kSlice ? length - first : kSlice;
      codes(rows + row * length + first, count, value[row], t + row * length + first);
    }
  });
}

Tensor floats_of(const int8_t* codes, int64_t r, int64_t length, const float* scale, int64_t step, ScalarType type) {
  const int64_t slice = 1024, slices = (length + slice - 1) / slice;
  Tensor out = empty({r, length}, type);
  const Dtype dtype = dtype_of(out);
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = dtype == Dtype::f32 ? 4 : 2;
  torch::stable::parallel_for(0, r * slices, grain(length < slice ? length : slice), [&](int64_t begin, int64_t end) {
    float floats[slice];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / slices, first = i % slices * slice, count = length - first < slice ? length - first : slice;
      const int64_t at = row * length + first;
      float* target = size == 4 ? reinterpret_cast<float*>(to) + at : floats;
      isa().dequantize(codes + at, count, scale[row * step], target);
      if (size == 2) isa().from_float(floats, count, dtype, to + at * size);
    }
  });
  return out;
}

namespace {

// Means float32 [R, 1] of rows [R, L], or of their magnitudes.
Tensor cpu_mean(const Tensor& rows, bool magnitudes) {
  STD_TORCH_CHECK(rows.is_contiguous() && rows.size(1) > 0, "rows must be contiguous and hold something");
  Tensor mean = empty({rows.size(0), 1}, ScalarType::Float);
  take_means(rows, rows.size(0), rows.size(1), magnitudes, static_cast<float*>(mean.mutable_data_ptr()));
  return mean;
}

// The sum in double of all squares: one call, as a small model's gradients are many and each is small.
double cpu_square_sum(std::vector<Tensor> tensors) {
  double sum = 0.0;
  for (const Tensor& x : tensors) {
    STD_TORCH_CHECK(x.is_contiguous(), "tensors must be contiguous");
    const Scratch<double> parts(slices_of(x.numel()));
    sum_slices(x, 1, x.numel(), isa().squares, parts.get());
    sum += total(parts.get(), slices_of(x.numel()));
  }
  return sum;
}

// int8 t of float32 rows [R, L]: with scale [R], ternary; with threshold [R], binary.
Tensor cpu_codes(const Tensor& rows, const Tensor& value, bool binary) {
  const int64_t r = rows.size(0), length = rows.size(1);
  const float *in = floats(rows, r * length, "rows"), *row_value = floats(value, r, "value");
  Tensor t = empty({r, length}, ScalarType::Char);
  take_codes(in, r, length, row_value, binary, static_cast<int8_t*>(t.mutable_data_ptr()));
  return t;
}

// Floats codes * scale of int8 rows [R, L] with one scale a row, or one for all: float32 (0), bfloat16 (1) or float16 (2).
Tensor cpu_dequantize(const Tensor& codes, const Tensor& scale, int64_t kind) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const int64_t r = codes.size(0), step = scale.numel() == 1 ? 0 : 1;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.is_contiguous() && kind >= 0 && kind < 3,
                  "wrong codes or kind");
  const float* row_scale = floats(scale, step ? r : 1, "scale");
  return floats_of(static_cast<const int8_t*>(codes.const_data_ptr()), r, codes.size(1), row_scale, step, kTypes[kind]);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cpu_mean(Tensor rows, bool magnitudes) -> Tensor");
  m.def("cpu_square_sum(Tensor[] tensors) -> float");
  m.def("cpu_codes(Tensor rows, Tensor value, bool binary) -> Tensor");
  m.def("cpu_dequantize(Tensor codes, Tensor scale, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_mean", TORCH_BOX(&cpu_mean));
  m.impl("cpu_square_sum", TORCH_BOX(&cpu_square_sum));
  m.impl("cpu_codes", TORCH_BOX(&cpu_codes));
  m.impl("cpu_dequantize", TORCH_BOX(&cpu_dequantize));
}

}  // namespace qat::binding
