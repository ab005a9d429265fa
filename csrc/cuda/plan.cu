// Which tile a product of many tokens takes, and into how many parts its K is split: host code only, from numbers alone.
//
// Counted are cycles of the busiest multiprocessor, blocks dealt out evenly. A stage takes as long as its tile's outputs are many,
// divided by what the warps reach of the products' rate: that is what shared memory gives. A product takes 1.5 cycles of a Hopper
// multiprocessor, which are 198 bytes, and needs 128, 192 or 256 of them. A block alone goes no faster than its copies arrive.
// Splits fill multiprocessors that tiles leave idle, and cost a launch, and sums that are written and read: one that gains less than
// a tenth is left out. The constants are estimates for Hopper, nothing here was measured, and only their ratios count.
#include <initializer_list>

#include "internal.h"
#include "platform.h"

namespace qat::cuda {
namespace {

struct Choice {
  Tile tile;
  int rows, columns;
  double stage;  // cycles
  int resident;  // blocks that a multiprocessor has room for
};
constexpr Choice kLarge = {Tile::large, 128, 256, 512 * 1.5, 1}, kMedium = {Tile::medium, 128, 128, 256 * 1.5 / 0.9, 2},
                 kSmall = {Tile::small, 64, 64, 64 * 1.5 / 0.75, 4};
constexpr Choice kHopper = {Tile::large, 256, 128, 1024, 1};   // wgmma: 4096 products of two codes a cycle
constexpr int64_t kDepth = 64, kHopperDepth = 128;             // codes of a stage

constexpr double kArrival = 600.0 / 3;           // cycles from a stage to the next where three are under way
constexpr double kWritten = 0.153, kKept = 0.1;  // an output: 2,500 instructions a warp of the large tile; a sum: 40 bytes a cycle
constexpr double kStart = 2000, kRead = 0.125;   // the launch that adds; a sum that it reads: 32 bytes a cycle
constexpr double kGain = 0.9;
constexpr int kMostSplits = 16, kLeastStages = 4, kWaves = 4;

struct Problem {
  int sms, m, n, stages;
};

// Of so many splits, each of `each` stages.
double cycles(const Choice& one, const Problem& p, int tiles, int splits, int each) {
  const int busiest = ceil_div(tiles * splits, p.sms);
  const double outputs = static_cast<double>(busiest) * one.rows * one.columns;
  const double products = busiest * one.stage, arrival = ceil_div(busiest, one.resident) * kArrival;
  const double loop = each * (products > arrival ? products : arrival);
  if (splits == 1) return loop + outputs * kWritten;
  const double added = static_cast<double>(p.m) * p.n / p.sms * (kRead * splits + kWritten);
  return (loop + outputs * kKept + kStart + added) / kGain;
}

// Splits are as many as make up to four whole waves of blocks. The larger tile, and the fewer splits, of two alike.
Plan best_of(std::initializer_list<Choice> choices, const Problem& p, bool may_split) {
  Plan best = {};
  for (const Choice& one : choices) {
    const int tiles = ceil_div(p.m, one.rows) * ceil_div(p.n, one.columns);
    for (int waves = 0; waves <= (may_split ? kWaves : 0); ++waves) {
      int splits = waves ? waves * p.sms / tiles : 1;
      if (waves && splits < 2) continue;
      if (splits > kMostSplits) splits = kMostSplits;
      if (splits > p.stages / kLeastStages) splits = p.stages / kLeastStages;
      if (splits < 1) splits = 1;
      const int each = ceil_div(p.stages, splits);
      splits = ceil_div(p.stages, each);
      const double time = cycles(one, p, tiles, splits, each);
      if (best.splits == 0 || time < best.cycles) best = {one.tile, splits, time};
    }
  }
  return best;
}

// More tokens or outputs than that are dealt out alike.
int shown(int64_t size) { return static_cast<int>(size < 1 << 20 ? size : 1 << 20); }

}  // namespace

Plan gemm_plan(int sms, int64_t m, int64_t n, int64_t k, int64_t groups, bool may_split) {
  const Problem p = {sms, shown(m), shown(n), static_cast<int>(groups * ceil_div(k / groups, kDepth))};
  return groups > 1 ? best_of({kMedium, kSmall}, p, false) : best_of({kLarge, kMedium, kSmall}, p, may_split);
}

Plan hopper_plan(int sms, int64_t m, int64_t n, int64_t k, bool may_split) {
  return best_of({kHopper}, {sms, shown(m), shown(n), static_cast<int>(ceil_div(k, kHopperDepth))}, may_split);
}

}  // namespace qat::cuda
