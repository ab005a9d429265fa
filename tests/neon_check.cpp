// Runs under qemu-user (tests/ops/test_neon.py): every entry of the NEON path against the portable one, on random problems.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/cpu/kernels.h"

namespace {

std::mt19937 random_bits(7);

struct Answer {
  std::vector<char> y;
  std::vector<float> x_scale;
  std::vector<int8_t> codes;
  bool operator==(const Answer& other) const {
    return y == other.y && codes == other.codes && std::memcmp(x_scale.data(), other.x_scale.data(), x_scale.size() * 4) == 0;
  }
};

Answer solve(const qat::Isa& isa, qat::Dtype dtype, int64_t m, int64_t n, int64_t k, int64_t groups, const std::vector<float>& x,
             const std::vector<uint32_t>& tiles, const std::vector<float>& scale) {
  const auto segments = qat::Segments::of(k, groups, false);
  const size_t size = dtype == qat::Dtype::f32 ? 4 : 2;
  std::vector<char> input(x.size() * size);
  isa.from_float(x.data(), static_cast<int64_t>(x.size()), dtype, input.data());
  Answer answer = {std::vector<char>(static_cast<size_t>(m * n) * size), std::vector<float>(static_cast<size_t>(m)), std::vector<int8_t>(static_cast<size_t>(m * k))};
  std::vector<int8_t> words(static_cast<size_t>(m * segments.row()));
  std::vector<int32_t> sums(static_cast<size_t>(m * groups));
  std::vector<float> divisor(static_cast<size_t>(m));
  qat::Linear p = {};
  p.isa = &isa, p.x = input.data(), p.y = answer.y.data(), p.dtype = dtype, p.tiles = tiles.data(), p.scale = scale.data();
  p.scale_per_row = groups == 1, p.m = m, p.n = n, p.k = k, p.segments = segments, p.eps = 1e-5f, p.absmax = -1.0f;
  p.words = words.data(), p.sums = sums.data(), p.divisor = divisor.data(), p.x_scale = answer.x_scale.data(), p.codes = answer.codes.data();
  qat::quantize_tokens(p, 0, m);
  qat::multiply(p, 0, p.items());
  return answer;
}

bool same(qat::Dtype dtype, int64_t m, int64_t n, int64_t k, int64_t groups) {
  const auto segments = qat::Segments::of(k, groups, false);
  const int64_t panels = (n + qat::kPanel - 1) / qat::kPanel;
  std::vector<float> x(static_cast<size_t>(m * k)), scale(static_cast<size_t>(panels * qat::kPanel * groups));
  std::vector<int8_t> codes(static_cast<size_t>(n * k));
  std::vector<uint32_t> tiles(static_cast<size_t>(panels * segments.count * segments.words(false)));
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random_bits);
  for (float& value : scale) value = 0.01f + 0.1f * static_cast<float>(random_bits() % 100);
  for (int8_t& code : codes) code = static_cast<int8_t>(static_cast<int>(random_bits() % 3) - 1);
  qat::make_tiles({qat::Source::codes, codes.data(), k, n, segments, false, tiles.data()}, 0, panels);
  return solve(qat::isa_at(0), dtype, m, n, k, groups, x, tiles, scale) == solve(qat::isa_at(1), dtype, m, n, k, groups, x, tiles, scale);
}

// Soft weights and slopes, and sums in double.
bool same_soft(int64_t n, float beta) {
  std::vector<float> w(static_cast<size_t>(n));
  std::normal_distribution<float> normal;
  for (float& value : w) value = normal(random_bits) / 30;
  const float s = 0.03f;
  const qat::Border borders[] = {{-s / 2, beta / s, s / 2, beta}, {s / 2, beta / s, s / 2, beta}};
  const qat::Soft plan = {0.0f, 2, borders};
  std::vector<float> answers[2];
  for (int path = 0; path < 2; ++path) {
    const qat::Isa& isa = qat::isa_at(path);
    std::vector<float> found(static_cast<size_t>(4 * n));
    isa.soften(w.data(), n, plan, found.data(), found.data() + n);
    isa.soften_ternary(w.data(), n, plan, found.data() + 2 * n, found.data() + 3 * n);
    for (const double sum : {isa.sum(w.data(), n), isa.magnitudes(w.data(), n), isa.squares(w.data(), n)}) found.push_back(static_cast<float>(sum));
    answers[path] = found;
  }
  return answers[0] == answers[1];
}

}  // namespace

int main() {
  if (qat::best_isa() < 1 || std::strcmp(qat::isa_at(1).name, "neon") != 0) return std::puts("this machine has no NEON dot products"), 2;
  int problems = 0;
  for (const int64_t n : {1, 4, 63, 1000})
    for (const float beta : {2.0f, 60.0f}) {
      if (!same_soft(n, beta)) return std::printf("soft codes of %d weights differ\n", int(n)), 1;
      ++problems;
    }
  for (const auto dtype : {qat::Dtype::f32, qat::Dtype::bf16, qat::Dtype::f16})
    for (const int64_t m : {1, 2, 3, 4, 5, 11})
      for (const int64_t n : {1, 63, 64, 130})
        for (const int64_t groups : {1, 3})
          for (const int64_t k : {3, 48, 99, 240}) {
            if (!same(dtype, m, n, k, groups)) return std::printf("M=%d N=%d K=%d G=%d differs\n", int(m), int(n), int(k), int(groups)), 1;
            ++problems;
          }
  std::printf("%d problems, neon equals portable\n", problems);
}
