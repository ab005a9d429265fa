// The operands of the matmuls: how stages of them come into shared memory, aligned or not.
#pragma once
#include "codes.h"

namespace qat::cuda {
namespace {

constexpr int kDepth = 64;  // codes along K in a stage of gemm.cu

// One operand: rows of int8 codes, or of 2-bit bytes. Stage i holds codes of one group only.
struct Operand {
  const uint8_t* data;
  int64_t rows, row_bytes;
  int length;  // codes of a group: 64-code stages start anew in each
  bool wide;   // 16 bytes at a time
};

// Chunk c (16 bytes) of row r of a stage of 64-byte rows: eight rows' equal chunks lie in different banks.
__device__ __forceinline__ int place(int r, int c) { return r * kDepth + ((c ^ (r >> 1 & 3)) * 16); }

// What a thread copies in every stage of ROWS rows of CHUNKS * 16 bytes: chunk threadIdx.x % CHUNKS of row threadIdx.x / CHUNKS,
// and of every kStep-th row from there. Addresses and validity are taken once, and move on.
template <int ROWS, int CHUNKS, int THREADS>
struct Copies {
  static constexpr int kStep = THREADS / CHUNKS, kCount = ROWS > kStep ? ROWS / kStep : 1;
  static_assert(ROWS <= kStep || ROWS % kStep == 0);
  const uint8_t* from;
  int64_t step;  // bytes from one of its rows to the next
  int left;      // bytes of a group from this chunk on
  int size[kCount];

  // `bytes`: of a group of a row
  __device__ __forceinline__ Copies(const uint8_t* data, int64_t rows, int64_t row_bytes, int bytes, int64_t row0) {
    const int r = row(), c = chunk();
    from = data + (row0 + r) * row_bytes + c * 16;
    step = kStep * row_bytes;
    left = bytes - c * 16;
#pragma unroll
    for (int s = 0; s < kCount; ++s) size[s] = r < ROWS && row0 + r + s * kStep < rows ? 16 : 0;
  }
  __device__ static __forceinline__ int row() { return static_cast<int>(threadIdx.x) / CHUNKS; }
  __device__ static __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % CHUNKS; }

  // `to`: where its first chunk goes. Rows that are kStep apart are swizzled alike.
  __device__ __forceinline__ void fetch(unsigned char* to) {
    const int inside = left > 0 ? 16 : 0;
    const uint8_t* source = from;
#pragma unroll
    for (int s = 0; s < kCount; ++s, source += step)
      if (ROWS >= kStep || row() < ROWS) copy_async_bytes(to + s * kStep * CHUNKS * 16, source, size[s] & inside);
    from += CHUNKS * 16;
    left -= CHUNKS * 16;
  }
  __device__ __forceinline__ void skip(int stages) {
    from += int64_t{stages} * (CHUNKS * 16);
    left -= stages * (CHUNKS * 16);
  }
  __device__ __forceinline__ void next_group(int64_t skipped, int bytes) {
    from += skipped;
    left = bytes - chunk() * 16;
  }
};

// A row of an operand from `start` on: `count` bytes may be read.
struct Tail {
  const uint8_t* from;
  int64_t count;
};

// 16 int8 codes, those past the end 0.
__device__ __forceinline__ void copy_narrow_codes(unsigned char* to, Tail tail) {
#pragma unroll 1
  for (int i = 0; i < 16; ++i) to[i] = i < tail.count ? tail.from[i] : 0;
}

// 64 codes as 2-bit bytes from any code on; what lies past a group's end meets activations of 0.
__device__ __forceinline__ void copy_narrow_bits(unsigned char* to, Tail tail, int shift) {
#pragma unroll 1
  for (int i = 0; i < 16; ++i) {
    uint32_t bits = i < tail.count ? tail.from[i] : 0;
    if (shift && i + 1 < tail.count) bits |= static_cast<uint32_t>(tail.from[i + 1]) << 8;
    to[i] = static_cast<unsigned char>(bits >> shift);
  }
}

// Of one operand, ROWS rows a stage, stage after stage. WIDE: by asynchronous copies.
template <int ROWS, int THREADS, bool BITS, bool GROUPS, bool WIDE>
struct Stages {
  static constexpr int kPerByte = BITS ? 4 : 1, kChunks = BITS ? 1 : 4;
  Copies<ROWS, kChunks, THREADS> copies;
  int64_t row0;
  int to, start = 0, inside = 0;  // codes before this stage, in the row and in its group

  __device__ __forceinline__ Stages(const Operand& o, int64_t first)
      : copies(o.data, o.rows, o.row_bytes, BITS ? static_cast<int>(o.row_bytes) : o.length, first), row0(first) {
    to = BITS ? copies.row() * 16 : place(copies.row(), copies.chunk());
  }

  // So many stages of the one group are another block's.
  __device__ __forceinline__ void skip(int stages) {
    static_assert(!GROUPS);
    if constexpr (WIDE) copies.skip(stages);
    start = inside = stages * kDepth;
  }

  __device__ __forceinline__ void fetch(unsigned char* stage, const Operand& o) {
    if constexpr (WIDE) {
      copies.fetch(stage + to);
    } else if constexpr (BITS) {
#pragma unroll 1
      for (int r = static_cast<int>(threadIdx.x); r < ROWS; r += THREADS) {
        const int64_t row = row0 + r, count = row < o.rows ? o.row_bytes - start / 4 : 0;
        copy_narrow_bits(stage + r * 16, {o.data + row * o.row_bytes + start / 4, count}, start % 4 * 2);
      }
    } else {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < ROWS * 4; i += THREADS) {
        const int r = i / 4, c = i % 4;
        const int64_t row = row0 + r, count = row < o.rows ? o.length - inside - c * 16 : 0;
        copy_narrow_codes(stage + place(r, c), {o.data + row * o.row_bytes + start + c * 16, count});
      }
    }
    if constexpr (!WIDE || (GROUPS && !BITS)) {  // groups of 2-bit bytes that are copied are whole stages
      start += kDepth;
      inside += kDepth;
      if (GROUPS && inside >= o.length) {
        start += o.length - inside;
        if (WIDE) copies.next_group(o.length - inside, o.length);
        inside = 0;
      }
    }
  }
};

}  // namespace
}  // namespace qat::cuda
