// The tensor-core instructions of sm_80 and later for bf16, and what feeds them: ldmatrix and cp.async.
//
// In a warp, lane = 4 * g + c. mma m16n8k16 computes C[16, 8] += A[16, 16] B[16, 8]; a lane holds
//   A: a[0] (row g, columns 2c, 2c+1), a[1] (row g+8, same), a[2] (row g, columns 2c+8, 2c+9), a[3] (row g+8,
//   same) B: b0 (rows 2c, 2c+1, column g), b1 (rows 2c+8, 2c+9, column g) C: c[0], c[1] (row g, columns 2c,
//   2c+1), c[2], c[3] (row g+8, same)
// so two neighbouring C tiles, packed to bf16, are an A tile: the product of a product needs no shuffle.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

namespace fathom::cuda {

__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Four 8 x 8 matrices of bf16; lanes 8i .. 8i+7 give the rows (16 bytes each) of matrix i, and r[i] gets its
/// elements (row g, columns 2c, 2c+1).
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
/// The same of the transposes: r[i] gets (rows 2c, 2c+1, column g).
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// The same from an address in shared memory.
__device__ __forceinline__ void load_matrices_transposed_at(std::uint32_t (&r)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

/// An 8 x 8 matrix of bf16 turned over: lanes give (row g, columns 2c, 2c+1), and get those of the transpose.
__device__ __forceinline__ std::uint32_t turn_over(std::uint32_t pair) {
  std::uint32_t turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(turned) : "r"(pair));
  return turned;
}

/// 16 bytes of shared memory. Such loads begin in the order in which they stand, before what follows: the
/// compiler would rather put each of them before the first product that wants it, which then waits.
__device__ __forceinline__ uint4 load_in_turn(unsigned address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

/// 16 bytes to shared memory in the background; zeros when not `valid` (`global` is then not read).
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
/// The same of what nothing reads again soon: it is the first to leave the L2 cache.
__device__ __forceinline__ void copy_async_once(void* shared, const void* global) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, policy;\n"
      "}\n" ::"r"(shared_address(shared)),
      "l"(global)
      : "memory");
}
/// What the copy above asks the L2 cache for, made once for many copies.
__device__ __forceinline__ std::uint64_t policy_of_once() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_async_once(void* shared, const void* global, std::uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/// Until at most `kPending` of this thread's groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/// Two floats as bf16, `low` in the low half.
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
/// The floats of such a pair.
__device__ __forceinline__ float low_of(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000U); }

}  // namespace fathom::cuda
