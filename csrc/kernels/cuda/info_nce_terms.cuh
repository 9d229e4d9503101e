// float32 operands of tensor cores, as sums of 16-bit terms. Each term is the rounded remainder after those before.
//
// Two float16 terms hold 22 bits, as good as three of bfloat16, which need more products; one has the 11 bits of tf32.
// But elements must be in float16's range. So they are multiplied by a power of two, by which scores and sums are
// divided. It is the same for nearly all tiles of nearly all queues: that of unit rows.
#pragma once

#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {

// The next term of two floats, which it leaves with their remainders.
template <typename Operand>
__device__ __forceinline__ uint32_t take_term(float& a, float& b, Operand type) {
  const uint32_t term = pack(a, b, type);
  const float2 rounded = unpack(term, type);
  a -= rounded.x;
  b -= rounded.y;
  return term;
}

// Of unit rows, and of queries: then the second terms of most elements are normal numbers, too.
constexpr float kUnitRowScale = 256.0f;

// What a block multiplies the elements of its keys by, before it splits them into float16 terms.
struct TermScale {
  static constexpr uint32_t kZero = 0x01000000u;  // size(0)
  static constexpr float kLeast = 4.0f;           // of the largest element: then errors are at most 2^-27 of it
  static constexpr float kMost = 0x1p15f;
  static constexpr float kStep = 0x1p11f;  // leads from above kMost to above kLeast, and back
  float value = kUnitRowScale;
  uint32_t largest = kZero;  // size() of the thread's elements of the tile
  bool settled = false;      // there was an element other than 0

  // In the order of |x|; infinities and NaN, which no factor brings into range, come before 0.
  __device__ __forceinline__ static uint32_t size(float x) { return (__float_as_uint(x) << 1) + kZero; }

  __device__ __forceinline__ void apply(float4& x) {
    largest = max(max(largest, max(size(x.x), size(x.y))), max(size(x.z), size(x.w)));
    x.x *= value, x.y *= value, x.z *= value, x.w *= value;
  }
  // Whether the tile fits. If not, it has to be split again, with another value. One that fits the first elements is
  // only lowered later. `any` tells whether an argument is true for any of the threads that split, and is a barrier.
  template <typename Any>
  __device__ __forceinline__ bool fits(const Any& any) {
    const float scaled = __uint_as_float((largest - kZero) >> 1) * value;
    largest = kZero;
    if (any(scaled > kMost)) {
      value *= 1.0f / kStep;
      settled = true;
      return false;
    }
    if (settled || !any(scaled > 0.0f)) return true;
    settled = value > 0x1p100f || any(scaled >= kLeast);
    if (!settled) value *= kStep;
    return settled;
  }
  // From scores and sums of the tile to those of a tile with the scale of unit rows.
  __device__ __forceinline__ float to_unit_rows() const {
    return kUnitRowScale * __uint_as_float((254u << 23) - __float_as_uint(value));  // 1 / value, a power of two
  }
};

// A tile's scores or sums, times a factor that is nearly always 1.
template <int tiles>
__device__ __forceinline__ void rescale_tile(float (&x)[tiles][4], float factor) {
  if (factor == 1.0f) return;
#pragma unroll
  for (int i = 0; i < 4 * tiles; ++i) x[i / 4][i % 4] *= factor;
}

}  // namespace moco_ext::cuda
