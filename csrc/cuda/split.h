// Products whose K is split among blocks: where the int32 sums of each split go, and the launch that makes y of them.
#pragma once
#include "outputs.h"

namespace qat::cuda {

struct Splits {
  Target target;  // of each split: sums as they are, rows padded to whole units; y itself where there is one split
  int count, stages;
};

// At most `wanted` splits of so many stages of K, all of them with some; one where there is no memory for more.
Splits splits_of(const Target& whole, int stages, int wanted, int32_t* partial);
// y = the splits' sums, added in int32, and what becomes of a sum. Nothing where there is one split.
int add_splits(const Splits& splits, const Target& whole, cudaStream_t stream);

}  // namespace qat::cuda
