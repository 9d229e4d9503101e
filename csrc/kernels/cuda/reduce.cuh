// Shared by the kernels: conversion to and from float, vector loads and stores, sums over a warp or a block, and the
// norm of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/cuda_launch.cuh"

namespace moco_ext::cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Two adjacent elements in one 32-bit word, the first in the low half.
__device__ __forceinline__ float2 unpack(uint32_t word, __nv_bfloat16) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack(uint32_t word, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}
__device__ __forceinline__ uint32_t pack(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack(float a, float b, __half) {
  const __half2 pair = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Elements of a row to load as From and store as To at once: 16 bytes of the wider type.
template <typename From, typename To>
constexpr int kVectorWidth = 16 / (sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));

template <int width, typename T>
__host__ __device__ __forceinline__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (width * sizeof(T)) == 0;
}

// `width` elements as stored in memory: what one load or store moves.
template <int width, typename T>
using Packed = std::conditional_t<width == 1, T, std::conditional_t<width * sizeof(T) == 16, uint4, uint2>>;

// One instruction, for 16 or 8 bytes or one element. The address must be aligned to that size.
template <int width, typename T>
__device__ __forceinline__ Packed<width, T> load_packed(const T* from) {
  return *reinterpret_cast<const Packed<width, T>*>(from);
}

template <int width, typename T>
__device__ __forceinline__ void unpack(const Packed<width, T>& from, float (&to)[width]) {
  if constexpr (width == 1) {
    to[0] = to_float(from);
  } else if constexpr (sizeof(T) == 4) {
    static_assert(width == 4);
    to[0] = __uint_as_float(from.x), to[1] = __uint_as_float(from.y);
    to[2] = __uint_as_float(from.z), to[3] = __uint_as_float(from.w);
  } else {
    const float2 a = unpack(from.x, T{}), b = unpack(from.y, T{});
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
    if constexpr (width == 8) {
      const float2 c = unpack(from.z, T{}), d = unpack(from.w, T{});
      to[4] = c.x, to[5] = c.y, to[6] = d.x, to[7] = d.y;
    }
  }
}

template <int width, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[width]) {
  unpack<width, T>(load_packed<width>(from), to);
}

template <int width, typename T>
__device__ __forceinline__ void store_floats(T* to, const float (&from)[width]) {
  if constexpr (width == 1) {
    *to = from_float<T>(from[0]);
  } else if constexpr (sizeof(T) == 4) {
    static_assert(width == 4);
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else if constexpr (width == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack(from[0], from[1], T{}), pack(from[2], from[3], T{}));
  } else {
    static_assert(width == 8);
    *reinterpret_cast<uint4*>(to) = make_uint4(pack(from[0], from[1], T{}), pack(from[2], from[3], T{}),
                                               pack(from[4], from[5], T{}), pack(from[6], from[7], T{}));
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int flip = kWarp / 2; flip > 0; flip /= 2) x += __shfl_xor_sync(0xffffffffu, x, flip);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int flip = kWarp / 2; flip > 0; flip /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, flip));
  return x;
}

// Sum over a team of threads, bitwise equal in each: a warp, or a whole block of `team` threads, all of which call it.
template <int team>
__device__ __forceinline__ float team_sum(float x) {
  x = warp_sum(x);
  if constexpr (team > kWarp) {
    __shared__ float partial[team / kWarp];
    __syncthreads();  // other threads may still be reading the previous sum
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = partial[0];
#pragma unroll
    for (int i = 1; i < team / kWarp; ++i) x += partial[i];
  }
  return x;
}

// For the launch bounds of kernels of 256 threads that hold a TeamRow. Without them, ptxas aims for more blocks and
// spills.
template <bool fits>
constexpr int kRowBlocksPerMultiprocessor = fits ? 5 : 3;

// One row, read by a team of threads `width` elements at a time. Its first elements stay in registers between the norm
// and the store, so that most rows are read from memory once. With `fits`, cols <= team * width: it needs far fewer
// registers, and more warps keep more loads in flight.
template <int width, bool fits, int team, typename From>
class TeamRow {
 public:
  __device__ __forceinline__ TeamRow(const From* row, int64_t cols, int member)
      : row_(row), cols_(cols), first_(int64_t{member} * width) {
#pragma unroll
    for (int i = 0; i < kCached; ++i) {
#pragma unroll
      for (int j = 0; j < width; ++j) cache_[i][j] = 0.0f;
      if (first_ + i * kStep < cols_) load_floats<width>(row_ + first_ + i * kStep, cache_[i]);
    }
  }

  // max(||row||, eps); NaN if the row contains one. Correct for norms up to the largest float, although their squares
  // overflow, and with kTiny also for norms down to the smallest normal one. Without it, eps must be at least 1e-12.
  template <bool kTiny = false>
  __device__ __forceinline__ float norm(float eps) const {
    float norm = sqrtf(team_sum<team>(sum_of_squares(1.0f)));
    const bool tiny = kTiny && norm < 0x1p-40f && eps < 0x1p-40f;
    if (isinf(norm) || tiny) {
      const float scale = tiny ? 0x1p100f : 0x1p-80f;  // squares neither overflow nor underflow
      norm = sqrtf(team_sum<team>(sum_of_squares(scale))) / scale;
    }
    return norm < eps ? eps : norm;
  }

  // to = row * factor, [cols]
  template <typename To>
  __device__ __forceinline__ void store(To* to, float factor) const {
#pragma unroll
    for (int i = 0; i < kCached; ++i) {
      if (first_ + i * kStep < cols_) store_scaled(to + first_ + i * kStep, cache_[i], factor);
    }
    if constexpr (!fits) {
      for (int64_t at = first_ + kCached * kStep; at < cols_; at += kStep) {
        float values[width];
        load_floats<width>(row_ + at, values);
        store_scaled(to + at, values, factor);
      }
    }
  }

 private:
  static constexpr int kCached = fits ? 1 : 4;
  static constexpr int kStep = team * width;

  __device__ __forceinline__ float sum_of_squares(float scale) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCached; ++i) sum = add_squares(sum, cache_[i], scale);
    if constexpr (!fits) {
      for (int64_t at = first_ + kCached * kStep; at < cols_; at += kStep) {
        float values[width];
        load_floats<width>(row_ + at, values);
        sum = add_squares(sum, values, scale);
      }
    }
    return sum;
  }

  static __device__ __forceinline__ float add_squares(float sum, const float (&values)[width], float scale) {
#pragma unroll
    for (int j = 0; j < width; ++j) sum = fmaf(values[j] * scale, values[j] * scale, sum);
    return sum;
  }

  template <typename To>
  static __device__ __forceinline__ void store_scaled(To* to, const float (&values)[width], float factor) {
    float scaled[width];
#pragma unroll
    for (int j = 0; j < width; ++j) scaled[j] = values[j] * factor;
    store_floats<width>(to, scaled);
  }

  const From* row_;
  int64_t cols_;
  int64_t first_;
  float cache_[kCached][width];
};

}  // namespace moco_ext::cuda
