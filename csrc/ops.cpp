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
  // Advice: a kernel without them is no error.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

Tensor make_tiles(const Tensor& rows, qat::Source source, int64_t k, int64_t groups, bool base3) {
  check_width(k, groups);
  const int64_t n = rows.size(0), row_bytes = rows.size(1);
  const int64_t per_byte = source == qat::Source::bits ? 4 : source == qat::Source::base3 ? 5 : 1;
  STD_TORCH_CHECK(
      rows.dim() == 2 && rows.is_contiguous() && rows.element_size() == 1 && row_bytes == (k + per_byte - 1) / per_byte,
      "wrong rows for tiles");
  const auto segments = qat::Segments::of(k, groups, base3);
  Tensor tiles = empty({tile_words(n, segments, base3)}, ScalarType::Int);
  ask_for_huge_pages(tiles.mutable_data_ptr(), tiles.numel() * 4);
  const qat::Tiling plan = {
      source, rows.const_data_ptr(), row_bytes, n, segments, base3, static_cast<uint32_t*>(tiles.mutable_data_ptr())};
  const int64_t panels = (n + qat::kPanel - 1) / qat::kPanel;
  torch::stable::parallel_for(0, panels, grain(k * qat::kPanel),
                              [&](int64_t begin, int64_t end) { qat::make_tiles(plan, begin, end); });
  return tiles;
}

Tensor cpu_tile(const Tensor& packed, int64_t k, int64_t groups, bool packed_base3, bool base3) {
  return make_tiles(packed, packed_base3 ? qat::Source::base3 : qat::Source::bits, k, groups, base3);
}

Tensor cpu_tile_codes(const Tensor& t, int64_t groups) { return make_tiles(t, qat::Source::codes, t.size(1), groups, false); }

const float* floats(const Tensor& x, int64_t n, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == n,
                  what, " must be contiguous float32 of ", n, " elements");
  return static_cast<const float*>(x.const_data_ptr());
}

// A linear's weights, checked; tokens, output and scratch are not set yet. `bias` may be null.
qat::Linear with_weights(const Tensor& tiles, const Tensor& scale, const Tensor* bias, int64_t n, int64_t k, int64_t groups,
                         bool base3, double eps) {
  check_width(k, groups);
  STD_TORCH_CHECK(!base3 || isa().dot_base3, "tiles in base3 need another path than ", isa().name);
  qat::Linear p = {};
  p.isa = &isa();
  p.n = n;
  p.k = k;
  p.segments = qat::Segments::of(k, groups, base3);
  p.base3 = base3;
  STD_TORCH_CHECK(
      tiles.scalar_type() == ScalarType::Int && tiles.is_contiguous() && tiles.numel() == tile_words(n, p.segments, base3),
      "tiles do not fit [", n, ", ", k, "]");
  p.tiles = static_cast<const uint32_t*>(tiles.const_data_ptr());
  const int64_t scales = groups > 1 ? p.panels() * groups * qat::kPanel : scale.numel() == 1 ? 1 : n;
  p.scale = floats(scale, scales, "scale");
  p.scale_per_row = scales != 1;
  p.bias = bias ? floats(*bias, n, "bias") : nullptr;
  p.eps = static_cast<float>(eps);
  p.absmax = -1.0f;
  return p;
}

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

void multiply(const qat::Linear& p) {
  const int64_t tokens = p.m < p.chunk_tokens() ? p.m : p.chunk_tokens();
  share(p.items(), grain(tokens * p.k * qat::kPanel / 16), [&](int64_t begin, int64_t end) { qat::multiply(p, begin, end); });
}

struct Result {
  Tensor y, x_q, x_scale;
};

Result run(const Tensor& x_any, const Tensor& tiles, const Tensor& scale, const std::optional<Tensor>& bias, int64_t n,
           int64_t k, int64_t groups, bool base3, bool per_tensor, double eps, bool keep) {
  qat::Linear p = with_weights(tiles, scale, bias ? &*bias : nullptr, n, k, groups, base3, eps);
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 1 && sizes[sizes.size() - 1] == k, "x must be [..., ", k, "]");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  p.m = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) p.m *= shape[i];

  Result result;
  if (keep) {
    result.x_q = empty(shape, ScalarType::Char);
    shape.back() = 1;
    result.x_scale = empty(shape, ScalarType::Float);
  }
  shape.back() = n;
  result.y = empty(shape, x.scalar_type());
  const Scratch<int8_t> words(p.m * p.segments.row());
  const Scratch<int32_t> sums(p.m * groups);
  const Scratch<float> divisor(p.m);

  p.x = x.const_data_ptr();
  p.y = result.y.mutable_data_ptr();
  p.dtype = dtype_of(x);
  p.words = words.get();
  p.sums = sums.get();
  p.divisor = divisor.get();
  p.x_scale = keep ? static_cast<float*>(result.x_scale.mutable_data_ptr()) : nullptr;
  p.codes = keep ? static_cast<int8_t*>(result.x_q.mutable_data_ptr()) : nullptr;
  if (p.m == 0) return result;
  quantize(p, per_tensor);
  if (n > 0) multiply(p);
  return result;
}

Tensor cpu_linear(const Tensor& x, const Tensor& tiles, const Tensor& scale, const std::optional<Tensor>& bias, int64_t n,
                  int64_t k, int64_t groups, bool base3, bool per_tensor, double eps) {
  return run(x, tiles, scale, bias, n, k, groups, base3, per_tensor, eps, false).y;
}

// y = x W^T of a few float32 tokens x [..., K] and W [N, K] in float32 or bfloat16, in float32: a matrix in full precision
// at the memory's speed, which torch's, made for many tokens, does not reach.
Tensor cpu_rows(const Tensor& x_any, const Tensor& weight) {
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const auto sizes = x.sizes();
  const qat::Dtype dtype = dtype_of(weight);
  const bool matrix = weight.is_contiguous() && weight.dim() == 2 && dtype != qat::Dtype::f16;
  STD_TORCH_CHECK(matrix, "weight must be contiguous float32 or bfloat16 [N, K]");
  const int64_t n = weight.size(0), k = weight.size(1);
  const bool fits = x.scalar_type() == ScalarType::Float && sizes.size() >= 1 && sizes[sizes.size() - 1] == k;
  STD_TORCH_CHECK(fits, "x must be float32 [..., ", k, "]");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = n;
  Tensor y = empty(shape, ScalarType::Float);
  constexpr int64_t block = 16;  // rows, which stay in the cache for all tokens
  const int64_t m = n > 0 ? y.numel() / n : 0, blocks = (n + block - 1) / block;
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

// A packed linear among a decoder's weights: tiles, scale, bias (empty: none) and [N, K, G, base3].
struct Projection {
  const Tensor &tiles, &scale, &bias;
  int64_t n, k, groups;
  bool base3;

  Projection(const Tensor* tensors, const int64_t* sizes)
      : tiles(tensors[0]), scale(tensors[1]), bias(tensors[2]), n(sizes[0]), k(sizes[1]), groups(sizes[2]),
        base3(sizes[3] != 0) {}

  // y of one float32 token.
  void operator()(const float* x, double eps, std::vector<float>& y) const {
    qat::Linear p = with_weights(tiles, scale, bias.numel() ? &bias : nullptr, n, k, groups, base3, eps);
    y.resize(static_cast<size_t>(n));
    const Scratch<int8_t> words(p.segments.row());
    const Scratch<int32_t> sums(groups);
    float divisor;
    p.x = x;
    p.y = y.data();
    p.dtype = qat::Dtype::f32;
    p.m = 1;
    p.words = words.get();
    p.sums = sums.get();
    p.divisor = &divisor;
    qat::quantize_tokens(p, 0, 1);
    multiply(p);
  }
};

// One layer's part of a decoder's weights and sizes, in this order; the norms of q and k heads may be empty.
struct Layer {
  static constexpr size_t kTensors = 16, kSizes = 16;
  const Tensor& norm;
  const Projection qkv, o;
  const Tensor& mlp_norm;
  const Projection gate_up, down;
  const Tensor &q_norm, &k_norm;

  Layer(const Tensor* w, const int64_t* sizes)
      : norm(w[0]), qkv(w + 1, sizes), o(w + 4, sizes + 4), mlp_norm(w[7]), gate_up(w + 8, sizes + 8), down(w + 11, sizes + 12),
        q_norm(w[14]), k_norm(w[15]) {}

  bool fits(int64_t hidden, int64_t q_width, int64_t kv_width) const {
    const bool attention = qkv.n == q_width + 2 * kv_width && qkv.k == hidden && o.n == hidden && o.k == q_width;
    return attention && gate_up.n == 2 * down.k && gate_up.k == hidden && down.n == hidden;
  }
};

// One token [1, H] through all layers of a Llama-shaped decoder: x += o(attend(qkv(norm(x)))), then
// x += down(silu(gate(norm(x))) * up(norm(x))).
// The token's keys and values are written at `position` of keys and values [layers, KV heads, room, D].
Tensor cpu_decode(const Tensor& x, const std::vector<Tensor> weights, const std::vector<int64_t> sizes, const Tensor& keys,
                  const Tensor& values, const Tensor& cos, const Tensor& sin, int64_t position, int64_t heads, double norm_eps,
                  double act_eps, double scaling) {
  const int64_t layers = keys.size(0), kv_heads = keys.size(1), room = keys.size(2), width = keys.size(3), hidden = x.numel();
  const int64_t rotary = cos.numel(), block = kv_heads * room * width;
  const auto count = static_cast<size_t>(layers);
  const bool complete = weights.size() == count * Layer::kTensors && sizes.size() == count * Layer::kSizes;
  STD_TORCH_CHECK(complete, "wrong number of weights");
  STD_TORCH_CHECK(
      position >= 0 && position < room && kv_heads > 0 && heads % kv_heads == 0 && rotary <= width && rotary % 2 == 0,
      "wrong position, heads or rotary width");
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
  for (size_t i = 0; i < count; ++i, key += block, value += block) {
    const Layer layer(&weights[i * Layer::kTensors], &sizes[i * Layer::kSizes]);
    STD_TORCH_CHECK(layer.fits(hidden, heads * width, kv_heads * width), "projections do not fit each other");
    isa().rms_norm(h, floats(layer.norm, hidden, "norm"), hidden, eps, normed.data());
    layer.qkv(normed.data(), act_eps, qkv);
    for (int64_t head = 0; head < heads + kv_heads; ++head) {
      float* part = &qkv[static_cast<size_t>(head * width)];
      const Tensor& norm = head < heads ? layer.q_norm : layer.k_norm;
      if (norm.numel()) isa().rms_norm(part, floats(norm, width, "head norm"), width, eps, part);
      isa().rotate(part, cosine, sine, rotary);
    }
    for (int64_t head = 0; head < kv_heads; ++head) {
      const size_t bytes = static_cast<size_t>(width) * sizeof(float);
      const int64_t at = (head * room + position) * width;
      std::memcpy(key + at, &qkv[static_cast<size_t>((heads + head) * width)], bytes);
      std::memcpy(value + at, &qkv[static_cast<size_t>((heads + kv_heads + head) * width)], bytes);
    }
    share(heads, grain(2 * (position + 1) * width), [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        const int64_t first = head / (heads / kv_heads) * room * width;
        isa().attend(&qkv[static_cast<size_t>(head * width)], key + first, value + first, position + 1, width,
                     static_cast<float>(scaling), &scores[static_cast<size_t>(head * room)],
                     &attended[static_cast<size_t>(head * width)]);
      }
    });
    layer.o(attended.data(), act_eps, out);
    for (int64_t j = 0; j < hidden; ++j) h[j] += out[static_cast<size_t>(j)];
    isa().rms_norm(h, floats(layer.mlp_norm, hidden, "norm"), hidden, eps, normed.data());
    layer.gate_up(normed.data(), act_eps, gated);
    isa().gate(gated.data(), gated.data() + layer.down.k, layer.down.k);
    layer.down(gated.data(), act_eps, out);
    for (int64_t j = 0; j < hidden; ++j) h[j] += out[static_cast<size_t>(j)];
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> cpu_bitlinear(const Tensor& x, const Tensor& tiles, const Tensor& scale,
                                                 const std::optional<Tensor>& bias, int64_t n, int64_t k, int64_t groups,
                                                 bool per_tensor, double eps) {
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
  const float *in = floats(rows, r * length, "rows"), *row_value = floats(value, r, "value");
  Tensor t = empty({r, length}, ScalarType::Char);
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
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.is_contiguous() && kind >= 0 && kind < 3,
                  "wrong codes or kind");
  const int64_t step = scale.numel() == 1 ? 0 : 1;
  const float* row_scale = floats(scale, step ? r : 1, "scale");
  Tensor out = empty({r, length}, kTypes[kind]);
  const qat::Dtype dtype = dtype_of(out);
  const auto* in = static_cast<const int8_t*>(codes.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = dtype == qat::Dtype::f32 ? 4 : 2;
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

int64_t cpu_best_isa() { return qat::best_isa(); }

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
      "cpu_decode(Tensor x, Tensor[] weights, int[] sizes, Tensor(a!) keys, Tensor(b!) values, Tensor cos, Tensor sin,"
      " int position, int heads, float norm_eps, float act_eps, float scaling) -> Tensor");
  m.def("cpu_quantize_activation(Tensor x, bool per_tensor, float eps) -> (Tensor, Tensor)");
  m.def("cpu_codes(Tensor rows, Tensor value, bool binary) -> Tensor");
  m.def("cpu_dequantize(Tensor codes, Tensor scale, int kind) -> Tensor");
  m.def("cpu_fingerprint(Tensor x) -> int");
  m.def("cpu_isa(int request) -> int");
  m.def("cpu_best_isa() -> int");
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
  m.impl("cpu_best_isa", TORCH_BOX(&cpu_best_isa));
  m.impl("cpu_peak", TORCH_BOX(&cpu_peak));
  m.impl("cpu_base3_tiles", TORCH_BOX(&cpu_base3_tiles));
}
