// The operands of gemm.cu: how stages of them come into shared memory, aligned or not.
#pragma once
#include "codes.h"

namespace qat::cuda {
namespace {

constexpr int kDepth = 64;  // codes along K in a stage

// One operand: rows of int8 codes, or of 2-bit bytes. Stage i holds codes of one group only.
struct Operand {
  const uint8_t* data;
  int64_t rows, row_bytes;
  int64_t length;  // codes of a group: 64-code stages start anew in each
  bool wide;       // 16 bytes at a time
};

// Chunk c (16 bytes) of row r of a stage of 64-byte rows: eight rows' equal chunks lie in different banks.
__device__ __forceinline__ int place(int r, int c) { return r * kDepth + ((c ^ (r >> 1 & 3)) * 16); }

// Where a stage's codes begin in a row, and how many are left in their group.
struct Cursor {
  int64_t start = 0;
  int64_t inside = 0;

  __device__ __forceinline__ void advance(const Operand& o) {
    start += kDepth;
    inside += kDepth;
    if (inside >= o.length) {
      start += o.length - inside;
      inside = 0;
    }
  }
};

// A row of an operand from `start` on: `count` bytes may be read. By value, as the functions below are calls.
struct Tail {
  const uint8_t* from;
  int64_t count;
};

// 16 int8 codes, those past the end 0.
__device__ __noinline__ void copy_narrow_codes(unsigned char* to, Tail tail) {
  for (int i = 0; i < 16; ++i) to[i] = i < tail.count ? tail.from[i] : 0;
}

// 64 codes as 2-bit bytes from any code on; what lies past a group's end meets activations of 0.
__device__ __noinline__ void copy_narrow_bits(unsigned char* to, Tail tail, int shift) {
  for (int i = 0; i < 16; ++i) {
    uint32_t bits = i < tail.count ? tail.from[i] : 0;
    if (shift && i + 1 < tail.count) bits |= static_cast<uint32_t>(tail.from[i + 1]) << 8;
    to[i] = static_cast<unsigned char>(bits >> shift);
  }
}

template <int ROWS, int THREADS>
__device__ __forceinline__ void fetch_codes(unsigned char* stage, const Operand& o, int64_t row0, const Cursor& at) {
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * 4; i += THREADS) {
    const int r = i / 4, c = i % 4;
    const int64_t row = row0 + r;
    if (o.wide) {
      const bool valid = row < o.rows && at.inside + c * 16 < o.length;
      copy_async(stage + place(r, c), o.data + (valid ? row * o.row_bytes + at.start + c * 16 : 0), valid);
    } else {
      const int64_t count = row < o.rows ? o.length - at.inside - c * 16 : 0;
      copy_narrow_codes(stage + place(r, c), {o.data + row * o.row_bytes + at.start + c * 16, count});
    }
  }
}

template <int ROWS, int THREADS>
__device__ __forceinline__ void fetch_bits(unsigned char* stage, const Operand& o, int64_t row0, const Cursor& at) {
#pragma unroll
  for (int r = static_cast<int>(threadIdx.x); r < ROWS; r += THREADS) {
    const int64_t row = row0 + r;
    if (o.wide) {
      const bool valid = row < o.rows && at.start / 4 < o.row_bytes;
      copy_async(stage + r * 16, o.data + (valid ? row * o.row_bytes + at.start / 4 : 0), valid);
    } else {
      const int64_t count = row < o.rows ? o.row_bytes - at.start / 4 : 0;
      copy_narrow_bits(stage + r * 16, {o.data + row * o.row_bytes + at.start / 4, count}, static_cast<int>(at.start % 4) * 2);
    }
  }
}

}  // namespace
}  // namespace qat::cuda
