// Thin wrappers around the PTX that the tensor-core kernels use, and for MOCO_EMULATE a host model of each, written
// from the fragment layouts in the PTX ISA.
//
// Fragments, with g = lane / 4 and t = lane % 4; a 32-bit register of A or B holds two adjacent 16-bit elements:
//   A [16, 16]: a0 (g, 2t..)  a1 (g+8, 2t..)  a2 (g, 2t+8..)  a3 (g+8, 2t+8..)
//   B [16, 8]:  b0 (2t.., g)  b1 (2t+8.., g)
//   D [16, 8]:  d0 (g, 2t)  d1 (g, 2t+1)  d2 (g+8, 2t)  d3 (g+8, 2t+1), float
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/cuda_launch.cuh"

#ifdef MOCO_EMULATE
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#endif

namespace moco_ext::cuda {

#ifndef MOCO_EMULATE

using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes; if !valid, writes zeros and reads nothing.
__device__ __forceinline__ void cp_async_16(SharedAddress shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int groups_left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(groups_left) : "memory");
}

// Four matrices of 8 rows x 16 bytes; lane 8i + j gives the address of row j of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}
__device__ __forceinline__ void load_shared_16(uint32_t (&r)[4], SharedAddress address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// d += a b
__device__ __forceinline__ void mma(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Hides the value of x from the optimizer.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// NaN stays.
__device__ __forceinline__ float at_most_zero(float x) {
  float y;
  asm("min.NaN.f32 %0, %1, 0f00000000;\n" : "=f"(y) : "f"(x));
  return y;
}

// a b + c, but at least 0 and at most 1; NaN becomes 0.
__device__ __forceinline__ float saturated_fma(float a, float b, float c) {
  float y;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;\n" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
}

#else  // MOCO_EMULATE

using SharedAddress = unsigned char*;

inline SharedAddress shared_address(void* shared) { return static_cast<unsigned char*>(shared); }

inline void cp_async_16(SharedAddress shared, const void* global, bool valid,
                        emu::Where where = emu::Where::current()) {
  emu::cp_async(shared, global, valid ? 16 : 0, 16, where);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int groups_left>
void cp_async_wait() {
  emu::cp_async_wait<groups_left>();
}

inline const unsigned char* emulated_matrix_row(unsigned char* const* rows, int matrix, int row) {
  const unsigned char* address = rows[8 * matrix + row];
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    emu::fail("ldmatrix: row %d of matrix %d is misaligned", row, matrix);
  return address;
}
inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  unsigned char* const* rows = emu::warp_exchange(row);
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&r[i], emulated_matrix_row(rows, i, emu::lane() / 4) + 4 * (emu::lane() % 4), 4);
  }
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  unsigned char* const* rows = emu::warp_exchange(row);
  for (int i = 0; i < 4; ++i) {  // elements (2t, g) and (2t+1, g) of the matrix in memory
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      std::memcpy(&pair[j], emulated_matrix_row(rows, i, 2 * (emu::lane() % 4) + j) + 2 * (emu::lane() / 4), 2);
    }
    std::memcpy(&r[i], pair, 4);
  }
}
inline void load_shared_16(uint32_t (&r)[4], SharedAddress address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emu::fail("ld.shared.v4 is misaligned");
  std::memcpy(r, address, 16);
}

// Tensor cores add exact products and round towards zero.
inline float emulated_truncate(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(nearest) > std::fabs(x) && std::isfinite(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}
inline double emulated_element(__nv_bfloat16, uint32_t word, int i) {
  return std::bit_cast<float>(word >> (16 * i) << 16);
}
inline double emulated_element(__half, uint32_t word, int i) {
  const auto bits = static_cast<uint16_t>(word >> (16 * i));
  const int exponent = bits >> 10 & 31;
  const double fraction = bits & 1023;
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * HUGE_VAL;
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25));
}

template <typename Element>
void mma(Element type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* all = emu::warp_exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (int i = 0; i < 4; ++i) {
    const int row = emu::lane() / 4 + (i >= 2 ? 8 : 0);
    const int column = 2 * (emu::lane() % 4) + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int t = k / 2 % 4;  // the lane of four that holds element k
      const int half = k / 8;   // 0 if in its first register, 1 if in its second
      const Operands& row_lane = all[row % 8 * 4 + t];
      const Operands& column_lane = all[column * 4 + t];
      sum += emulated_element(type, row_lane.a[row / 8 + 2 * half], k % 2) *
             emulated_element(type, column_lane.b[half], k % 2);
    }
    d[i] = emulated_truncate(sum);
  }
}

inline int opaque(int x) { return x; }

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}

inline float at_most_zero(float x) { return x > 0.0f ? 0.0f : x; }

inline float saturated_fma(float a, float b, float c) {
  const float y = std::fma(a, b, c);
  return y > 0.0f ? std::min(y, 1.0f) : 0.0f;
}

#endif

}  // namespace moco_ext::cuda
