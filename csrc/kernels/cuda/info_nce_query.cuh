// What the InfoNCE kernels need to know about queries, from the rows as the caller has them: no kernel runs before the
// passes.
//
// The operand of the products is the query times a power of two, which brings its largest element to [0.5, 1): within
// the range of fp16 for any norm, and exact, so that a query of the keys' type is not rounded. The norm scales the
// scores.
#pragma once

#include "kernels/cuda/info_nce_workspace.cuh"
#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {

// Over a block of at most 32 warps, in a fixed order; every thread gets the results.
template <typename T, int count, typename Join>
__device__ __forceinline__ void block_join(T (&x)[count], Join join) {
  __shared__ T parts[32][count];
  __syncthreads();  // all threads have read the previous result
#pragma unroll
  for (int i = 0; i < count; ++i) {
    x[i] = warp_join(x[i], join);
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) {
    x[i] = parts[0][i];
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) x[i] = join(x[i], parts[warp][i]);
  }
}
template <typename T, typename Join>
__device__ __forceinline__ T block_join(T x, Join join) {
  T values[] = {x};
  block_join(values, join);
  return values[0];
}

// Calls f(T{}). The type is chosen when the kernel runs, so that there need not be a kernel for each.
template <typename F>
__device__ __forceinline__ void with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::kBFloat16) {
    f(__nv_bfloat16{});
  } else if (dtype == Dtype::kFloat16) {
    f(__half{});
  } else {
    f(float{});
  }
}

// An element of rows of that type.
__device__ __forceinline__ float element(const void* rows, Dtype dtype, int64_t at) {
  float value = 0.0f;
  with_type(dtype, [&]<typename T>(T) { value = to_float(static_cast<const T*>(rows)[at]); });
  return value;
}
__device__ __forceinline__ float2 load_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* from) {
  return unpack(*reinterpret_cast<const uint32_t*>(from), T{});
}

struct QueryFacts {
  float unit;      // the operand is the query times this power of two
  float scale;     // a score is the operand's product with a key times this
  float positive;  // score of the query and its key
  float query_norm;
  float key_norm;
};

// The power of two that brings the largest element to [0.5, 1). Rows below 2^-64 count as 0 in fp16, and NaN as 0 here.
__device__ __forceinline__ float unit_of(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 126;
  return __uint_as_float(static_cast<uint32_t>(127 - min(max(exponent, -64), 126)) << 23);
}

// By the threads that share a row: each(f) calls f(query, key) for a thread's elements, and join(x, operation) joins
// the threads' values x [count]. Squares of elements times their unit neither overflow nor underflow.
template <typename Each, typename Join>
__device__ __forceinline__ QueryFacts query_facts(const InfoNceQueries& queries, const Each& each, const Join& join) {
  float largest[2] = {};  // of query and key
  each([&](float query, float key) {
    largest[0] = fmaxf(largest[0], fabsf(query));
    largest[1] = fmaxf(largest[1], fabsf(key));
  });
  join(largest, Max{});
  const float unit = unit_of(largest[0]);
  const float key_unit = unit_of(largest[1]);
  float sums[3] = {};
  each([&](float query, float key) {
    query *= unit;
    key *= key_unit;
    sums[0] += query * query;
    sums[1] += key * key;
    sums[2] += query * key;
  });
  join(sums, Add{});
  const float query_norm = sqrtf(sums[0]) / unit;
  const float key_norm = sqrtf(sums[1]) / key_unit;
  const float scale = 1.0f / unit / queries.divisor(query_norm);
  return {unit, scale, sums[2] * (scale * (1.0f / key_unit / queries.divisor(key_norm))), query_norm, key_norm};
}

// The same, by a warp or a block: the thread's first element, and the step to its next one.
template <typename Join>
__device__ __forceinline__ QueryFacts query_facts(const InfoNceQueries& queries, int64_t row, int64_t first,
                                                  int64_t step, const Join& join) {
  return query_facts(
      queries,
      [&](const auto& f) {
        for (int64_t i = first; row < queries.n && i < queries.c; i += step) {
          const int64_t at = row * queries.c + i;
          f(element(queries.query, queries.dtype, at),
            queries.key == nullptr ? 0.0f : element(queries.key, queries.dtype, at));
        }
      },
      join);
}
__device__ __forceinline__ QueryFacts warp_query_facts(const InfoNceQueries& queries, int64_t row) {
  return query_facts(queries, row, threadIdx.x % kWarp, kWarp, [](auto& x, auto operation) {
    for (auto& value : x) value = warp_join(value, operation);
  });
}
__device__ __forceinline__ QueryFacts block_query_facts(const InfoNceQueries& queries, int64_t row) {
  return query_facts(queries, row, threadIdx.x, blockDim.x, [](auto& x, auto operation) { block_join(x, operation); });
}

// For tensor cores, a row of the operand, of the columns from first_column on. `lanes` adjacent lanes share it: pair i
// of a lane is at column 2 (i lanes + lane % lanes). Four lanes hold it as operand A does (mma.cuh). `join` must
// include the warps that have its other columns.
template <int lanes = 4, int pairs, typename Join>
__device__ __forceinline__ QueryFacts load_query(const InfoNceQueries& queries, int64_t row, int first_column,
                                                 float2 (&query)[pairs], const Join& join) {
  float2 key[pairs];
  with_type(queries.dtype, [&]<typename T>(T) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int64_t column = first_column + 2 * (i * lanes + static_cast<int>(threadIdx.x) % lanes);
      const bool exists = row < queries.n && column < queries.c;
      const int64_t at = row * queries.c + column;
      query[i] = exists ? load_pair(static_cast<const T*>(queries.query) + at) : float2{};
      key[i] = exists && queries.key != nullptr ? load_pair(static_cast<const T*>(queries.key) + at) : float2{};
    }
  });
  const QueryFacts facts = query_facts(
      queries,
      [&](const auto& f) {
#pragma unroll
        for (int i = 0; i < pairs; ++i) f(query[i].x, key[i].x), f(query[i].y, key[i].y);
      },
      [&](auto& x, auto operation) {
        for (auto& value : x) value = warp_join<lanes>(value, operation);
        join(x, operation);
      });
#pragma unroll
  for (int i = 0; i < pairs; ++i) query[i].x *= facts.unit, query[i].y *= facts.unit;
  return facts;
}

}  // namespace moco_ext::cuda
