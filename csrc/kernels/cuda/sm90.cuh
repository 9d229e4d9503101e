// Thin wrappers around Hopper's instructions (sm_90a): warpgroups, mbarriers, bulk tensor copies, warpgroup matrix
// products.
// sm90_layout.cuh describes the tiles in shared memory.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/sm90_layout.cuh"

#ifdef MOCO_EMULATE
#include "emulated_sm90_instructions.h"
#else

namespace moco_ext::cuda::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ float load_shared_4(uint32_t shared) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(shared) : "memory");
  return x;
}
__device__ __forceinline__ float4 load_shared_16(uint32_t shared) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_4(uint32_t shared, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared_8(uint32_t shared, uint32_t low, uint32_t high) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(low), "r"(high) : "memory");
}

// ---- the block's warpgroups

// The registers of each of the warpgroup's threads from here on.
template <int registers>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int before, int registers>
__device__ __forceinline__ void set_registers() {
  if constexpr (registers < before) release_registers<registers>();
  if constexpr (registers > before) claim_registers<registers>();
}
// A barrier of the 128 threads of one warpgroup; `id` is from 1 to 15, because __syncthreads uses 0.
__device__ __forceinline__ void warpgroup_barrier(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }
// Such a barrier, which also tells whether any thread's `x` is true.
__device__ __forceinline__ bool any_of_warpgroup(int id, bool x) {
  int any = 0;
  asm volatile(
      "{\n"
      ".reg .pred mine, any;\n"
      "setp.ne.b32 mine, %1, 0;\n"
      "bar.red.or.pred any, %2, 128, mine;\n"
      "selp.b32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(static_cast<int>(x)), "r"(id)
      : "memory");
  return any != 0;
}

// ---- mbarriers

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes this thread's writes to shared memory visible to tensor copies and warpgroup products, after the next barrier.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Makes initialized barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_shared();
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the barrier's phase of that parity has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- bulk tensor copies

// Box of `map` at (column, row) -> shared memory; completes on the barrier.
__device__ __forceinline__ void copy_tensor(uint32_t shared, const CUtensorMap& map, int column, int row,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- warpgroup matrix products
//
// Products are asynchronous. From products_begin until products_wait, only products may use their registers.

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the last `groups_left` groups.
template <int groups_left = 0>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups_left) : "memory");
}

// Keeps values in their registers across asynchronous products: the compiler may not move what uses them over this.
template <int count>
__device__ __forceinline__ void pin(float (&x)[count][4]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(x[i][j])::"memory");
  }
}
template <int count>
__device__ __forceinline__ void pin(uint32_t (&x)[count][4]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(x[i][j])::"memory");
  }
}

#define MOCO_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MOCO_D16(i) MOCO_D4(i), MOCO_D4(i + 1), MOCO_D4(i + 2), MOCO_D4(i + 3)
#define MOCO_D32(i) MOCO_D16(i), MOCO_D16(i + 4)
#define MOCO_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define MOCO_R32 MOCO_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MOCO_R64                                                                                                      \
  MOCO_R32                                                                                                            \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define MOCO_R96                                                                                                      \
  MOCO_R64                                                                                                            \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
  "%92,%93,%94,%95"
#define MOCO_R128                                                                                     \
  MOCO_R96                                                                                            \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115," \
  "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d [64, n] = (keep ? d : 0) + a [64, 16] b [16, n]. multiply_rows: b is a row operand. multiply_columns: b is a column
// operand. a is a row operand in shared memory, or in registers: each warp holds 16 rows, as the A operand in mma.cuh.
#define MOCO_PRODUCTS(Type, type, n, tiles, regs, outs, k0, k1, k2, k3, k4, k5, k6)                                    \
  template <int down>                                                                                                  \
  __device__ __forceinline__ void multiply_from_shared(float (&d)[tiles][4], uint64_t a, uint64_t b, int keep, Type) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" k2                                                               \
                 ", 0;\n"                                                                                              \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" regs "}, %" k0 ", %" k1           \
                 ", p, 1, 1, 0, %" k3 ";\n}\n"                                                                         \
                 : outs                                                                                                \
                 : "l"(a), "l"(b), "r"(keep), "n"(down));                                                              \
  }                                                                                                                    \
  template <int down>                                                                                                  \
  __device__ __forceinline__ void multiply_from_registers(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b,    \
                                                          int keep, Type) {                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" k5                                                               \
                 ", 0;\n"                                                                                              \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" regs "}, {%" k0 ",%" k1 ",%" k2   \
                 ",%" k3 "}, %" k4 ", p, 1, 1, %" k6 ";\n}\n"                                                          \
                 : outs                                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(down));                          \
  }
#define MOCO_OUTS32 MOCO_D16(0)
#define MOCO_OUTS64 MOCO_D32(0)
#define MOCO_OUTS128 MOCO_D32(0), MOCO_D32(8)
#define MOCO_OUTS192 MOCO_D32(0), MOCO_D32(8), MOCO_D32(16)
#define MOCO_OUTS256 MOCO_D32(0), MOCO_D32(8), MOCO_D32(16), MOCO_D32(24)
#define MOCO_PRODUCTS_OF(Type, type)                                                                        \
  MOCO_PRODUCTS(Type, type, "32", 4, MOCO_R16, MOCO_OUTS32, "16", "17", "18", "19", "20", "21", "22")       \
  MOCO_PRODUCTS(Type, type, "64", 8, MOCO_R32, MOCO_OUTS64, "32", "33", "34", "35", "36", "37", "38")       \
  MOCO_PRODUCTS(Type, type, "128", 16, MOCO_R64, MOCO_OUTS128, "64", "65", "66", "67", "68", "69", "70")    \
  MOCO_PRODUCTS(Type, type, "192", 24, MOCO_R96, MOCO_OUTS192, "96", "97", "98", "99", "100", "101", "102") \
  MOCO_PRODUCTS(Type, type, "256", 32, MOCO_R128, MOCO_OUTS256, "128", "129", "130", "131", "132", "133", "134")
MOCO_PRODUCTS_OF(__nv_bfloat16, "bf16")
MOCO_PRODUCTS_OF(__half, "f16")

template <int tiles, typename Type>
__device__ __forceinline__ void multiply_rows(float (&d)[tiles][4], uint64_t a, uint64_t b, int keep, Type type) {
  multiply_from_shared<0>(d, a, b, keep, type);
}
template <int tiles, typename Type>
__device__ __forceinline__ void multiply_columns(float (&d)[tiles][4], uint64_t a, uint64_t b, int keep, Type type) {
  multiply_from_shared<1>(d, a, b, keep, type);
}
template <int tiles, typename Type>
__device__ __forceinline__ void multiply_rows(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b, int keep,
                                              Type type) {
  multiply_from_registers<0>(d, a, b, keep, type);
}
template <int tiles, typename Type>
__device__ __forceinline__ void multiply_columns(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b, int keep,
                                                 Type type) {
  multiply_from_registers<1>(d, a, b, keep, type);
}

#undef MOCO_D4
#undef MOCO_D16
#undef MOCO_D32
#undef MOCO_R16
#undef MOCO_R32
#undef MOCO_R64
#undef MOCO_R96
#undef MOCO_R128
#undef MOCO_OUTS32
#undef MOCO_OUTS64
#undef MOCO_OUTS128
#undef MOCO_OUTS192
#undef MOCO_OUTS256
#undef MOCO_PRODUCTS
#undef MOCO_PRODUCTS_OF

}  // namespace moco_ext::cuda::sm90

#endif
