// The Hopper tensor cores' asynchronous products (sm_90a), by a warpgroup of 128 threads.
//
// product_s8: acc [64, 128] += a [64, 32] . b [128, 32]^T. `a` is in registers, each warp's 16 rows as in mma_s8. `b` is in
// shared memory, rows of 128 bytes whose 16-byte chunk c lies at c ^ (row % 8) (the 128-byte swizzle), in blocks of 8 rows
// that are 1024-byte aligned; `b` is at the 32 bytes of row 0 that count. acc[j][0..3] are as in mma_s8, for columns 8 j.
#pragma once
#include "ptx.h"

namespace qat::cuda {

#if defined(QAT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QAT_WGMMA 1
#endif

constexpr int kWarpgroup = 128;
constexpr int kSwizzleRow = 128;

}  // namespace qat::cuda

#if defined(QAT_EMULATE)
#include "../emulation/wgmma.h"
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace qat::cuda {

// What copy_async wrote, and was waited for, becomes visible to the products; call it before the barrier.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers that products read or add to are ready; call it before the first product of a group.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Matrix descriptor: start address, 1024 bytes from one block of 8 rows to the next, 128-byte swizzle.
using Matrix = uint64_t;
__device__ __forceinline__ Matrix matrix_at(const unsigned char* b) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(b));
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// So many bytes further on, a multiple of 16.
__device__ __forceinline__ Matrix moved(Matrix b, int bytes) { return b + static_cast<uint64_t>(bytes / 16); }

__device__ __forceinline__ void product_s8(int32_t (&acc)[16][4], const uint32_t (&a)[4], Matrix b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1;"
      : "+r"(acc[0][0]), "+r"(acc[0][1]), "+r"(acc[0][2]), "+r"(acc[0][3]), "+r"(acc[1][0]), "+r"(acc[1][1]), "+r"(acc[1][2]),
        "+r"(acc[1][3]), "+r"(acc[2][0]), "+r"(acc[2][1]), "+r"(acc[2][2]), "+r"(acc[2][3]), "+r"(acc[3][0]), "+r"(acc[3][1]),
        "+r"(acc[3][2]), "+r"(acc[3][3]), "+r"(acc[4][0]), "+r"(acc[4][1]), "+r"(acc[4][2]), "+r"(acc[4][3]), "+r"(acc[5][0]),
        "+r"(acc[5][1]), "+r"(acc[5][2]), "+r"(acc[5][3]), "+r"(acc[6][0]), "+r"(acc[6][1]), "+r"(acc[6][2]), "+r"(acc[6][3]),
        "+r"(acc[7][0]), "+r"(acc[7][1]), "+r"(acc[7][2]), "+r"(acc[7][3]), "+r"(acc[8][0]), "+r"(acc[8][1]), "+r"(acc[8][2]),
        "+r"(acc[8][3]), "+r"(acc[9][0]), "+r"(acc[9][1]), "+r"(acc[9][2]), "+r"(acc[9][3]), "+r"(acc[10][0]), "+r"(acc[10][1]),
        "+r"(acc[10][2]), "+r"(acc[10][3]), "+r"(acc[11][0]), "+r"(acc[11][1]), "+r"(acc[11][2]), "+r"(acc[11][3]),
        "+r"(acc[12][0]), "+r"(acc[12][1]), "+r"(acc[12][2]), "+r"(acc[12][3]), "+r"(acc[13][0]), "+r"(acc[13][1]),
        "+r"(acc[13][2]), "+r"(acc[13][3]), "+r"(acc[14][0]), "+r"(acc[14][1]), "+r"(acc[14][2]), "+r"(acc[14][3]),
        "+r"(acc[15][0]), "+r"(acc[15][1]), "+r"(acc[15][2]), "+r"(acc[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace qat::cuda

#endif
