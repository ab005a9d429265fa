// The only file that knows torch, through its stable ABI (torch 2.11 and later): it checks shapes, allocates, splits the
// work among torch's threads and calls the kernels. These ops are below autograd and are not for users: qat/ops/cpu.py
// calls them, caches the tiles, and says what a user did wrong.
//
// Legend: M tokens, N out_features, K in_features, G groups along K (see cpu/kernels.h for tiles and words).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxWidth = 1 << 18;  // sums stay far from the ends of int32
constexpr int64_t kGrain = 1 << 16;     // multiplications or bytes below which a second thread does not pay

const qat::Isa* chosen = nullptr;

const qat::Isa& isa() {
  if (!chosen) chosen = &qat::isa_at(qat::best_isa());
  return *chosen;
}

qat::Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return qat::Dtype::f32;
    case ScalarType::BFloat16: return qat::Dtype::bf16;
    case ScalarType::Half: return qat::Dtype::f16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// The C function, because torch::stable::empty goes through the dispatcher, which one token's arithmetic would notice.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = step;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Uninitialized scratch memory, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) / 64 + 1) * 64)), std::free) {
    STD_TORCH_CHECK(data_ != nullptr, "out of memory for ", count, " scratch elements");
  }
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T, void (*)(void*)> data_;
};

int64_t grain(int64_t cost_of_one) { return kGrain / (cost_of_one > 0 ? cost_of_one : 1) + 1; }

// Runs work(begin, end) over [0, items). Threads take small parts from a common counter, so that one that wakes late or
// shares its core with another program delays nobody; an equal split waits for the slowest.
template <class Work>
void share(int64_t items, int64_t least, const Work& work) {
  const int64_t most = (items + least - 1) / least, threads = torch::stable::get_num_threads();
  const int64_t workers = threads < most ? threads : most;
  if (workers <= 1) return work(0, items);
  const int64_t step = items / (workers * 8) > 0 ? items / (workers * 8) : 1;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(step); begin < items; begin = next.fetch_add(step))
      work(begin, begin + step < items ? begin + step : items);
  });
}

void check_width(int64_t k, int64_t groups) {
  STD_TORCH_CHECK(k >= 0 && k <= kMaxWidth && groups >= 1 && k % groups == 0, "unsupported K = ", k, " in ", groups, " groups");
}

int64_t tile_words(int64_t n, const qat::Segments& s, bool base3) {
  return (n + qat::kPanel - 1) / qat::kPanel * s.count * s.words(base3);
}

// Tiles are read front to back at every call: huge pages save a tenth to a fifth of that where memory is the limit.
void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a kernel without them is no error
#else
  (void)data, (void)bytes;
#endif
}

Tensor make_tiles(const Tensor& rows, qat::Source source, int64_t k, int64_t groups, bool base3) {
  check_width(k, groups);
  const int64_t n = rows.size(0), row_bytes = rows.size(1), per_byte = source == qat::Source::bits ? 4 : source == qat::Source::base3 ? 5 : 1;
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.element_size() == 1 && row_bytes == (k + per_byte - 1) / per_byte, "wrong rows for tiles");
  const auto segments = qat::Segments::of(k, groups, base3);
  Tensor tiles = empty({tile_words(n, segments, base3)}, ScalarType::Int);
  ask_for_huge_pages(tiles.mutable_data_ptr(), tiles.numel() * 4);
  const qat::Tiling plan = {source, rows.const_data_ptr(), row_bytes, n, segments, base3, static_cast<uint32_t*>(tiles.mutable_data_ptr())};
  const int64_t panels = (n + qat::kPanel - 1) / qat::kPanel;
  torch::stable::parallel_for(0, panels, grain(k * qat::kPanel), [&](int64_t begin, int64_t end) { qat::make_tiles(plan, begin, end); });
  return tiles;
}

Tensor cpu_tile(const Tensor& packed, int64_t k, int64_t groups, bool packed_base3, bool base3) {
  return make_tiles(packed, packed_base3 ? qat::Source::base3 : qat::Source::bits, k, groups, base3);
}

Tensor cpu_tile_codes(const Tensor& t, int64_t groups) { return make_tiles(t, qat::Source::codes, t.size(1), groups, false); }

// Quantizes all tokens of p into its scratch.
void quantize(qat::Linear& p, bool per_tensor) {
  const int64_t step = grain(p.k);
  if (per_tensor) {
    torch::stable::parallel_for(0, p.m, step, [&](int64_t begin, int64_t end) { qat::measure_tokens(p, begin, end); });
    p.absmax = 0.0f;
    for (int64_t row = 0; row < p.m; ++row)
      if (p.absmax == p.absmax && !(p.divisor[row] <= p.absmax)) p.absmax = p.divisor[row];  // takes a NaN, and keeps it
  }
  share(p.m, step, [&](int64_t begin, int64_t end) { qat::quantize_tokens(p, begin, end); });
}

struct Result {
  Tensor y, x_q, x_scale;
};

Result run(const Tensor& x_any, const Tensor& tiles, const Tensor& scale, const std::optional<Tensor>& bias, int64_t n, int64_t k,
           int64_t groups, bool base3, bool per_tensor, double eps, bool keep) {
  check_width(k, groups);
  STD_TORCH_CHECK(!base3 || isa().dot_base3, "tiles in base3 need another path than ", isa().name);
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 1 && sizes[sizes.size() - 1] == k, "x must be [..., ", k, "]");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  int64_t m = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) m *= shape[i];

  const auto segments = qat::Segments::of(k, groups, base3);
  const int64_t panels = (n + qat::kPanel - 1) / qat::kPanel, scales = groups > 1 ? panels * groups * qat::kPanel : scale.numel() == 1 ? 1 : n;
  STD_TORCH_CHECK(tiles.numel() == tile_words(n, segments, base3), "tiles do not fit [", n, ", ", k, "]");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous() && scale.numel() == scales, "wrong scale");
  if (bias) STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == n, "wrong bias");

  Result result;
  if (keep) result.x_q = empty(shape, ScalarType::Char);
  shape.back() = keep ? 1 : n;
  if (keep) {
    result.x_scale = empty(shape, ScalarType::Float);
    shape.back() = n;
  }
  result.y = empty(shape, x.scalar_type());
  const Scratch<int8_t> words(m * segments.row());
  const Scratch<int32_t> sums(m * groups);
  const Scratch<float> divisor(m);

  qat::Linear p = {};
  p.isa = &isa();
  p.x = x.const_data_ptr();
  p.y = result.y.mutable_data_ptr();
  p.dtype = dtype_of(x);
  p.tiles = static_cast<const uint32_t*>(tiles.const_data_ptr());
  p.base3 = base3;
  p.scale = static_cast<const float*>(scale.const_data_ptr());
  p.scale_per_row = scales != 1;
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.m = m;
  p.n = n;
  p.k = k;
  p.segments = segments;
  p.eps = static_cast<float>(eps);
  p.absmax = -1.0f;
  p.words = words.get();
  p.sums = sums.get();
  p.divisor = divisor.get();
  p.x_scale = keep ? static_cast<float*>(result.x_scale.mutable_data_ptr()) : nullptr;
  p.codes = keep ? static_cast<int8_t*>(result.x_q.mutable_data_ptr()) : nullptr;
  if (m == 0) return result;
  quantize(p, per_tensor);
  if (n == 0) return result;
  const int64_t items = p.items(), tokens = m < p.chunk_tokens() ? m : p.chunk_tokens();
  share(items, grain(tokens * k * qat::kPanel / 16), [&](int64_t begin, int64_t end) { qat::multiply(p, begin, end); });
  return result;
}

Tensor cpu_linear(const Tensor& x, const Tensor& tiles, const Tensor& scale, const std::optional<Tensor>& bias, int64_t n, int64_t k,
                  int64_t groups, bool base3, bool per_tensor, double eps) {
  return run(x, tiles, scale, bias, n, k, groups, base3, per_tensor, eps, false).y;
}

// y = x W^T of a few float32 tokens x [..., K] and W [N, K] in float32 or bfloat16, in float32: a matrix in full precision at the
// memory's speed, which torch's, made for many tokens, does not reach.
Tensor cpu_rows(const Tensor& x_any, const Tensor& weight) {
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const auto sizes = x.sizes();
  const qat::Dtype dtype = dtype_of(weight);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.dim() == 2 && dtype != qat::Dtype::f16, "weight must be contiguous float32 or bfloat16 [N, K]");
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && sizes.size() >= 1 && sizes[sizes.size() - 1] == k, "x must be float32 [..., ", k, "]");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = n;
  Tensor y = empty(shape, ScalarType::Float);
  const int64_t m = n > 0 ? y.numel() / n : 0, block = 16, blocks = (n + block - 1) / block;  // rows that stay in the cache for all tokens
  if (m == 0) return y;
  const auto* in = static_cast<const float*>(x.const_data_ptr());
  const auto* rows = static_cast<const char*>(weight.const_data_ptr());
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  share(blocks, grain(m * block * k / 16), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * block; row < end * block && row < n; row += block) {
      const int64_t count = n - row < block ? n - row : block;
      for (int64_t token = 0; token < m; ++token)
        isa().rows(in + token * k, rows + row * k * weight.element_size(), dtype, count, k, out + token * n + row);
    }
  });
  return y;
}

// A packed linear of one float32 token among the weights of a decoder: tiles, scale, bias (empty: none) and [N, K, G, base3].
class Projection {
 public:
  Projection(const Tensor* tensors, const int64_t* sizes, double eps) : k_(sizes[1]), row_(qat::Segments::of(sizes[1], sizes[2], sizes[3] != 0).row()) {
    const Tensor &tiles = tensors[0], &scale = tensors[1], &bias = tensors[2];
    const int64_t groups = sizes[2], panels = (sizes[0] + qat::kPanel - 1) / qat::kPanel;
    p_.isa = &isa();
    p_.dtype = qat::Dtype::f32;
    p_.base3 = sizes[3] != 0;
    p_.m = 1;
    p_.n = sizes[0];
    p_.k = k_;
    check_width(k_, groups);
    p_.segments = qat::Segments::of(k_, groups, p_.base3);
    const int64_t scales = groups > 1 ? panels * groups * qat::kPanel : scale.numel() == 1 ? 1 : p_.n;
    STD_TORCH_CHECK(!p_.base3 || isa().dot_base3, "tiles in base3 need another path than ", isa().name);
    STD_TORCH_CHECK(tiles.numel() == tile_words(p_.n, p_.segments, p_.base3) && scale.numel() == scales, "tiles or scale of another shape");
    STD_TORCH_CHECK(bias.numel() == 0 || bias.numel() == p_.n, "bias of another shape");
    p_.tiles = static_cast<const uint32_t*>(tiles.const_data_ptr());
    p_.scale = static_cast<const float*>(scale.const_data_ptr());
    p_.scale_per_row = scales != 1;
    p_.bias = bias.numel() ? static_cast<const float*>(bias.const_data_ptr()) : nullptr;
    p_.eps = static_cast<float>(eps);
    p_.absmax = -1.0f;
  }

  void operator()(const float* x, std::vector<float>& y) {
    y.resize(static_cast<size_t>(p_.n));
    const Scratch<int8_t> words(row_);
    const Scratch<int32_t> sums(p_.segments.count);
    float divisor;
    p_.x = x;
    p_.y = y.data();
    p_.words = words.get();
    p_.sums = sums.get();
    p_.divisor = &divisor;
    qat::quantize_tokens(p_, 0, 1);
    share(p_.items(), grain(k_ * qat::kPanel / 16), [&](int64_t begin, int64_t end) { qat::multiply(p_, begin, end); });
  }

 private:
  qat::Linear p_ = {};
  int64_t k_, row_;
};

constexpr size_t kLayerTensors = 16;  // norm, qkv, o, norm, gate and up, down (each projection 3), norms of q and k heads (or empty)
constexpr size_t kLayerSizes = 16;    // of the four projections

const float* floats(const Tensor& x, int64_t n, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == n, what, " must be contiguous float32 of ", n, " elements");
  return static_cast<const float*>(x.const_data_ptr());
}

// One token [1, H] through all layers of a Llama-shaped decoder: x += o(attend(qkv(norm(x)))), x += down(silu(gate(norm(x))) * up(norm(x))).
// The token's keys and values are written at `position` of keys and values [layers, KV heads, room, D].
Tensor cpu_decode(const Tensor& x, const std::vector<Tensor> weights, const std::vector<int64_t> sizes, const Tensor& keys, const Tensor& values,
                  const Tensor& cos, const Tensor& sin, int64_t position, int64_t heads, double norm_eps, double act_eps, double scaling) {
  const int64_t layers = keys.size(0), kv_heads = keys.size(1), room = keys.size(2), width = keys.size(3), hidden = x.numel();
  const int64_t rotary = cos.numel(), block = kv_heads * room * width;
  STD_TORCH_CHECK(weights.size() == static_cast<size_t>(layers) * kLayerTensors && sizes.size() == static_cast<size_t>(layers) * kLayerSizes, "wrong number of weights");
  STD_TORCH_CHECK(position >= 0 && position < room && heads % kv_heads == 0 && rotary <= width && rotary % 2 == 0, "wrong position, heads or rotary width");
  const float *cosine = floats(cos, rotary, "cos"), *sine = floats(sin, rotary, "sin");
  floats(keys, layers * block, "keys"), floats(values, layers * block, "values");
  auto* key = static_cast<float*>(keys.mutable_data_ptr());
  auto* value = static_cast<float*>(values.mutable_data_ptr());
  const auto eps = static_cast<float>(norm_eps);

  Tensor y = empty({1, hidden}, ScalarType::Float);
  auto* h = static_cast<float*>(y.mutable_data_ptr());
  std::memcpy(h, floats(x, hidden, "x"), static_cast<size_t>(hidden) * sizeof(float));
  std::vector<float> normed(static_cast<size_t>(hidden)), qkv, attended(static_cast<size_t>(heads * width)), out, gated;
  std::vector<float> scores(static_cast<size_t>(heads * room));
  for (int64_t layer = 0; layer < layers; ++layer, key += block, value += block) {
    const Tensor* w = &weights[static_cast<size_t>(layer) * kLayerTensors];
    const int64_t* size = &sizes[static_cast<size_t>(layer) * kLayerSizes];
    STD_TORCH_CHECK(size[0] == (heads + 2 * kv_heads) * width && size[1] == hidden && size[4] == hidden && size[5] == heads * width &&
                    size[8] % 2 == 0 && size[9] == hidden && size[12] == hidden && size[13] == size[8] / 2, "projections do not fit each other");
    isa().rms_norm(h, floats(w[0], hidden, "norm"), hidden, eps, normed.data());
    Projection(w + 1, size, act_eps)(normed.data(), qkv);
    for (int64_t head = 0; head < heads + kv_heads; ++head) {
      float* part = &qkv[static_cast<size_t>(head * width)];
      const Tensor& norm = head < heads ? w[14] : w[15];
      if (norm.numel()) isa().rms_norm(part, floats(norm, width, "head norm"), width, eps, part);
      qat::rotate(part, cosine, sine, rotary);
    }
    for (int64_t head = 0; head < kv_heads; ++head) {
      const size_t bytes = static_cast<size_t>(width) * sizeof(float);
      std::memcpy(key + (head * room + position) * width, &qkv[static_cast<size_t>((heads + head) * width)], bytes);
      std::memcpy(value + (head * room + position) * width, &qkv[static_cast<size_t>((heads + kv_heads + head) * width)], bytes);
    }
    share(heads, grain(2 * (position + 1) * width), [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        const int64_t first = head / (heads / kv_heads) * room * width;
        isa().attend(&qkv[static_cast<size_t>(head * width)], key + first, value + first, position + 1, width, static_cast<float>(scaling),
                     &scores[static_cast<size_t>(head * room)], &attended[static_cast<size_t>(head * width)]);
      }
    });
    Projection(w + 4, size + 4, act_eps)(attended.data(), out);
    for (int64_t i = 0; i < hidden; ++i) h[i] += out[static_cast<size_t>(i)];
    isa().rms_norm(h, floats(w[7], hidden, "norm"), hidden, eps, normed.data());
    Projection(w + 8, size + 8, act_eps)(normed.data(), gated);
    isa().gate(gated.data(), gated.data() + size[13], size[13]);
    Projection(w + 11, size + 12, act_eps)(gated.data(), out);
    for (int64_t i = 0; i < hidden; ++i) h[i] += out[static_cast<size_t>(i)];
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> cpu_bitlinear(const Tensor& x, const Tensor& tiles, const Tensor& scale, const std::optional<Tensor>& bias,
                                                 int64_t n, int64_t k, int64_t groups, bool per_tensor, double eps) {
  Result result = run(x, tiles, scale, bias, n, k, groups, false, per_tensor, eps, true);
  return {result.y, result.x_q, result.x_scale};
}

std::tuple<Tensor, Tensor> cpu_quantize_activation(const Tensor& x, bool per_tensor, double eps) {
  const int64_t k = x.size(x.dim() - 1);
  const Tensor none = empty({0}, ScalarType::Int), one = torch::stable::full({1}, 1.0, ScalarType::Float);
  Result result = run(x, none, one, std::nullopt, 0, k, 1, false, per_tensor, eps, true);
  return {result.x_q, result.x_scale};
}

// int8 t of float32 rows [R, L]: with scale [R], ternary; with threshold [R], binary.
Tensor cpu_codes(const Tensor& rows, const Tensor& value, bool binary) {
  const int64_t r = rows.size(0), length = rows.size(1);
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float && rows.is_contiguous(), "rows must be contiguous float32");
  STD_TORCH_CHECK(value.scalar_type() == ScalarType::Float && value.is_contiguous() && value.numel() == r, "wrong value");
  Tensor t = empty({r, length}, ScalarType::Char);
  const auto* in = static_cast<const float*>(rows.const_data_ptr());
  const auto* row_value = static_cast<const float*>(value.const_data_ptr());
  auto* out = static_cast<int8_t*>(t.mutable_data_ptr());
  const auto codes = binary ? isa().binary : isa().ternary;
  // A unit is a slice of a row, so that a single long row (one scale a tensor) is shared among the threads too.
  const int64_t slice = 4096, slices = (length + slice - 1) / slice;
  torch::stable::parallel_for(0, r * slices, grain(slice), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / slices, first = i % slices * slice, count = length - first < slice ? length - first : slice;
      codes(in + row * length + first, count, row_value[row], out + row * length + first);
    }
  });
  return t;
}

// Floats codes * scale of int8 rows [R, L] with one scale a row, or one for all: float32 (0), bfloat16 (1) or float16 (2).
Tensor cpu_dequantize(const Tensor& codes, const Tensor& scale, int64_t kind) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const int64_t r = codes.size(0), length = codes.size(1), slice = 1024, slices = (length + slice - 1) / slice;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.is_contiguous() && kind >= 0 && kind < 3, "wrong codes or kind");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous() && (scale.numel() == r || scale.numel() == 1), "wrong scale");
  Tensor out = empty({r, length}, kTypes[kind]);
  const qat::Dtype dtype = dtype_of(out);
  const auto* in = static_cast<const int8_t*>(codes.const_data_ptr());
  const auto* row_scale = static_cast<const float*>(scale.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = dtype == qat::Dtype::f32 ? 4 : 2, step = scale.numel() == 1 ? 0 : 1;
  torch::stable::parallel_for(0, r * slices, grain(slice), [&](int64_t begin, int64_t end) {
    float floats[slice];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / slices, first = i % slices * slice, count = length - first < slice ? length - first : slice;
      const int64_t at = row * length + first;
      float* target = size == 4 ? reinterpret_cast<float*>(to) + at : floats;
      isa().dequantize(in + at, count, row_scale[row * step], target);
      if (size == 2) isa().from_float(floats, count, dtype, to + at * size);
    }
  });
  return out;
}

int64_t cpu_fingerprint(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  const int64_t bytes = x.numel() * x.element_size(), slice = 1 << 18, slices = (bytes + slice - 1) / slice;
  const auto* data = static_cast<const uint8_t*>(x.const_data_ptr());
  std::vector<uint64_t> parts(static_cast<size_t>(slices));
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[static_cast<size_t>(i)] = qat::fingerprint(data + i * slice, bytes - i * slice < slice ? bytes - i * slice : slice);
  });
  return static_cast<int64_t>(qat::fingerprint(parts.data(), slices * 8));
}

// Index of the path in use, portable first. From 0 on, `request` selects one that the CPU has; -1 only asks.
int64_t cpu_isa(int64_t request) {
  const int64_t best = qat::best_isa();
  STD_TORCH_CHECK(request <= best, "this CPU does not have path ", request);
  if (request >= 0) chosen = &qat::isa_at(static_cast<int>(request));
  for (int64_t i = 0; i < best; ++i)
    if (&isa() == &qat::isa_at(static_cast<int>(i))) return i;
  return best;
}

// For qat.bench: read x once, and run so many rounds of dot products on every thread, giving the operations done.
int64_t cpu_read(const Tensor& x) {
  const int64_t words = x.numel() * x.element_size() / 8, slice = 1 << 17, slices = (words + slice - 1) / slice;
  const auto* data = static_cast<const uint64_t*>(x.const_data_ptr());
  std::vector<uint64_t> sums(static_cast<size_t>(slices));
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sums[static_cast<size_t>(i)] = isa().read(data + i * slice, words - i * slice < slice ? words - i * slice : slice);
  });
  uint64_t sum = 0;
  for (uint64_t part : sums) sum += part;
  return static_cast<int64_t>(sum);
}

int64_t cpu_peak(int64_t rounds) {
  if (!isa().peak) return 0;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<int64_t> operations(static_cast<size_t>(threads));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) operations[static_cast<size_t>(i)] = isa().peak(rounds);
  });
  int64_t sum = 0;
  for (int64_t part : operations) sum += part;
  return sum;
}

bool cpu_base3_tiles() { return isa().dot_base3 != nullptr; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("cpu_tile(Tensor packed, int k, int groups, bool packed_base3, bool base3) -> Tensor");
  m.def("cpu_tile_codes(Tensor t, int groups) -> Tensor");
  m.def(
      "cpu_linear(Tensor x, Tensor tiles, Tensor scale, Tensor? bias, int n, int k, int groups, bool base3, bool per_tensor,"
      " float eps) -> Tensor");
  m.def("cpu_rows(Tensor x, Tensor weight) -> Tensor");
  m.def(
      "cpu_bitlinear(Tensor x, Tensor tiles, Tensor scale, Tensor? bias, int n, int k, int groups, bool per_tensor, float eps)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_decode(Tensor x, Tensor[] weights, int[] sizes, Tensor(a!) keys, Tensor(b!) values, Tensor cos, Tensor sin, int position,"
      " int heads, float norm_eps, float act_eps, float scaling) -> Tensor");
  m.def("cpu_quantize_activation(Tensor x, bool per_tensor, float eps) -> (Tensor, Tensor)");
  m.def("cpu_codes(Tensor rows, Tensor value, bool binary) -> Tensor");
  m.def("cpu_dequantize(Tensor codes, Tensor scale, int kind) -> Tensor");
  m.def("cpu_fingerprint(Tensor x) -> int");
  m.def("cpu_isa(int request) -> int");
  m.def("cpu_base3_tiles() -> bool");
  m.def("cpu_read(Tensor x) -> int");
  m.def("cpu_peak(int rounds) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("cpu_tile", TORCH_BOX(&cpu_tile));
  m.impl("cpu_tile_codes", TORCH_BOX(&cpu_tile_codes));
  m.impl("cpu_linear", TORCH_BOX(&cpu_linear));
  m.impl("cpu_rows", TORCH_BOX(&cpu_rows));
  m.impl("cpu_bitlinear", TORCH_BOX(&cpu_bitlinear));
  m.impl("cpu_decode", TORCH_BOX(&cpu_decode));
  m.impl("cpu_quantize_activation", TORCH_BOX(&cpu_quantize_activation));
  m.impl("cpu_codes", TORCH_BOX(&cpu_codes));
  m.impl("cpu_dequantize", TORCH_BOX(&cpu_dequantize));
  m.impl("cpu_fingerprint", TORCH_BOX(&cpu_fingerprint));
  m.impl("cpu_read", TORCH_BOX(&cpu_read));
}

STABLE_TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_peak", TORCH_BOX(&cpu_peak));
  m.impl("cpu_base3_tiles", TORCH_BOX(&cpu_base3_tiles));
}
