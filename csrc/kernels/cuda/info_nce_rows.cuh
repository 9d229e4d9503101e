// The InfoNCE kernel before the pass over the queue, `prepare`, and what kernels over rows share. info_nce_combine.cuh
// has the kernel after the pass.
#pragma once

#include <climits>
#include <cmath>

#include "kernels/cuda/info_nce_workspace.cuh"
#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <typename T, typename Join>
__device__ __forceinline__ T warp_join(T x, Join join) {
#pragma unroll
  for (int flip = 16; flip > 0; flip /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, flip));
  return x;
}

__device__ __forceinline__ int block_thread() {
  return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

// Over a block of at most 32 warps, in a fixed order; every thread gets the result.
template <typename T, typename Join>
__device__ __forceinline__ T block_join(T x, Join join) {
  __shared__ T parts[32];
  const int thread = block_thread();
  x = warp_join(x, join);
  __syncthreads();  // all threads have read the previous result
  if (thread % 32 == 0) parts[thread / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int i = 1; i < block_threads() / 32; ++i) x = join(x, parts[i]);
  return x;
}

constexpr int kRowWarps = 4;  // per block, one row each

inline dim3 row_blocks(int64_t rows) { return {static_cast<unsigned>((rows + kRowWarps - 1) / kRowWarps)}; }

struct RowOptions {
  int64_t n;
  int64_t c;
  float eps;
  bool normalize;
  __device__ float divisor(float norm) const { return !normalize ? 1.0f : norm < eps ? eps : norm; }
};

// The norm of x [c], computed by a warp from each lane's part of the square.
template <typename T>
__device__ __forceinline__ float warp_norm(const T* x, int c, float square, int lane) {
  const float norm = sqrtf(warp_join(square, Add{}));
  if (!isinf(norm)) return norm;
  square = 0.0f;  // the square overflows, the norm may not
#pragma unroll 1
  for (int i = lane; i < c; i += 32) square += to_float(x[i]) * 0x1p-80f * (to_float(x[i]) * 0x1p-80f);
  return sqrtf(warp_join(square, Add{})) * 0x1p80f;
}

// What prepare writes about the rows of x; null: not wanted.
template <typename Operand>
struct InfoNceOperand {
  Operand* rows;                 // [padded, C] x, as unit rows if normalize, divided by row_scale; the padding is 0
  float* norm;                   // [N]
  float* key_norm = nullptr;     // [N] of the rows' keys, 1 if they have none; all that follows is for queries
  float* positive = nullptr;     // [padded] x . anchor
  float* row_scale = nullptr;    // [padded]
  unsigned* finished = nullptr;  // [1] set to 0
  bool scaled = false;           // otherwise row_scale is 1
};

// 2^exponent, from -126 to 127.
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// x and, where the operand is that of queries, their anchors. A warp per row. It takes as long as its instructions take
// to arrive from memory, so there are few of them.
template <typename T, typename Operand>
__global__ void info_nce_prepare_kernel(const T* x, InfoNceAnchor<T> anchor, RowOptions options, int64_t padded,
                                        InfoNceOperand<Operand> operand) {
  let_next_kernel_start();
  constexpr int kHeld = 4;  // elements of a lane in registers
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (row >= padded) return;
  const int c = static_cast<int>(options.c);
  const bool is_query = operand.positive != nullptr;
  Operand* const to = operand.rows + row * c;
  if (row == 0 && lane == 0 && is_query) *operand.finished = 0;
  if (row >= options.n) {  // padding: computed with the rest of its block, but not written to the outputs
#pragma unroll 1
    for (int i = lane; i < c; i += 32) to[i] = from_float<Operand>(0.0f);
    if (lane == 0 && is_query) {
      operand.positive[row] = 0.0f;
      operand.row_scale[row] = 1.0f;
    }
    return;
  }
  x += row * c;
  const bool has_key = anchor.key != nullptr;
  const T* const key = has_key ? anchor.key + row * c : nullptr;
  const float* const target = has_key || anchor.target == nullptr ? nullptr : anchor.target + row * c;
  float value[kHeld];
  float other[kHeld];  // of the anchor
  const auto load = [&](int first) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int i = first + 32 * j;
      value[j] = i < c ? to_float(x[i]) : 0.0f;
      other[j] = i >= c ? 0.0f : has_key ? to_float(key[i]) : target != nullptr ? target[i] : 0.0f;
    }
  };
  float square = 0.0f;
  float other_square = 0.0f;
  float largest = 0.0f;
#pragma unroll 1
  for (int first = lane; first < c; first += 32 * kHeld) {
    load(first);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      square += value[j] * value[j];
      other_square += other[j] * other[j];
      largest = fmaxf(largest, fabsf(value[j]));
    }
  }
  const float norm = warp_norm(x, c, square, lane);
  const float divisor = options.divisor(norm);
  const float key_norm = has_key ? warp_norm(key, c, other_square, lane) : 1.0f;
  const float key_divisor = has_key ? options.divisor(key_norm) : 1.0f;

  // Scaling by a power of two is exact, and keeps rows of any norm within the range of fp16: the largest element is
  // then in [0.5, 1).
  int exponent = 0;
  largest = warp_join(largest, Max{}) / divisor;
  if (operand.scaled && largest > 0.0f && largest < INFINITY) {
    exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23) - 126, -100), 100);
  }
  const float scale = power_of_two(-exponent);
  float positive = 0.0f;
#pragma unroll 1
  for (int first = lane; first < c; first += 32 * kHeld) {
    if (c > 32 * kHeld) load(first);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const float unit = value[j] / divisor;
      positive += unit * (other[j] / key_divisor);
      if (const int i = first + 32 * j; i < c) to[i] = from_float<Operand>(unit * scale);
    }
  }
  if (lane == 0 && operand.norm != nullptr) operand.norm[row] = norm;
  if (!is_query) return;
  positive = warp_join(positive, Add{});
  if (lane == 0) {
    operand.key_norm[row] = key_norm;
    operand.positive[row] = positive;
    operand.row_scale[row] = power_of_two(exponent);
  }
}

}  // namespace moco_ext::cuda
