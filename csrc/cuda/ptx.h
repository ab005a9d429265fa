// Every instruction that C++ has no word for, one small function each, in PTX. The emulation has the same in plain C++
// (../emulation/ptx.h), for the tests.
#pragma once
#include "platform.h"

#if defined(QAT_EMULATE)
#include "../emulation/ptx.h"
#else

namespace qat::cuda {

// ---- arithmetic: one rounding each, never contracted to a fused multiply-add

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float reciprocal(float a) { return __frcp_rn(a); }
// Within a unit of 1 / a, for any a that is not near the ends of the exponents.
__device__ __forceinline__ float reciprocal_near(float a) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(a));
  return out;
}
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float square_root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ float max_nan(float a, float b) {  // keeps a NaN, as torch's amax does
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }
// Byte i of the result is byte (selector >> 4 i & 7) of b:a. Only the low 16 bits of the selector count.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}

// ---- memory

// Shared memory, where the emulation is to count who meets in a bank.
template <class T>
__device__ __forceinline__ T load_shared(const void* from) {
  return *static_cast<const T*>(from);
}
template <class T>
__device__ __forceinline__ void store_shared(void* to, T value) {
  *static_cast<T*>(to) = value;
}
// 16 bytes that are read once: they leave no room taken in the L1 cache.
__device__ __forceinline__ uint4 load_streaming(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
// What the previous kernel wrote, for a kernel that may have started before that one ended: from the L2 cache.
__device__ __forceinline__ uint4 load_fresh(const void* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ float load_fresh_float(const float* from) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
  return v;
}
// 16 bytes from global to shared memory without passing through registers; zeros where `bytes` is 0 and not 16.
__device__ __forceinline__ void copy_async_bytes(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  copy_async_bytes(shared, global, valid ? 16 : 0);
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of the calling thread's latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Brings a line into the L2 cache, where later writes to it are seen: a kernel may ask for what the one before still writes.
__device__ __forceinline__ void prefetch(const void* global) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}
// Programmatic launch: until the previous kernel's writes can be read; and the next one may be launched.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void atomic_max(uint32_t* to, uint32_t value) { atomicMax(to, value); }
__device__ __forceinline__ void atomic_add(int32_t* to, int32_t value) { atomicAdd(to, value); }
__device__ __forceinline__ void atomic_min(uint64_t* to, uint64_t value) {
  atomicMin(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// ---- what the lanes of a warp do together

template <class V>
__device__ __forceinline__ V shuffle_xor(V value, unsigned mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Four 8 x 16-byte matrices from shared memory: lane i gives row i % 8 of matrix i / 8, and takes bytes 4q..4q + 3 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}
// c [16, 8] += a [16, 32] . b [8, 32]^T on int8 tensor cores.
// Fragments: a[0] rows g, k 4q..; a[1] rows g + 8; a[2], a[3] the same at k 16 + 4q..; b[0] column g, k 4q..; b[1] k 16 + 4q..;
// c[0], c[1] row g, columns 2q, 2q + 1; c[2], c[3] row g + 8; with g = lane / 4 and q = lane % 4.
__device__ __forceinline__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with bytes of a from 0 to 255.
__device__ __forceinline__ void mma_u8s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c plus the sum of the four int8 of a.
__device__ __forceinline__ int32_t add_bytes(uint32_t a, int32_t c) {
  return __dp4a(static_cast<int>(a), 0x01010101, c);
}

// ---- conversions

__device__ __forceinline__ float half_to_float(uint16_t h) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(h));
  return out;
}
__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}
__device__ __forceinline__ uint16_t float_to_bfloat(float value) {
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}

}  // namespace qat::cuda

#endif
