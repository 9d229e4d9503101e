// key = m * key + (1 - m) * query over a list of tensors, in one launch.
//
// The list is passed by value as a kernel parameter: nothing to allocate or cache, and a replayed CUDA graph reads no
// host memory. CUDA 12.1 and later allow 32,764 bytes of parameters.
#include "kernels/cuda.h"
#include "kernels/cuda/cuda_launch.cuh"
#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {
namespace {

// ---- kernel

constexpr int kThreads = 256;
constexpr int kChunk = 4096;  // elements per block, all loaded before the first is used
constexpr int kTensors = 1000;
constexpr int kLowPrecisionTensors = 800;

// A struct of arrays has no padding.
template <int capacity, bool kLowPrecision>
struct TensorTable {
  void* key[capacity];
  const void* query[capacity];
  int64_t numel[capacity];
  uint32_t first_chunk[capacity];  // the chunks of tensor t: blocks [first_chunk[t], first_chunk[t + 1])
  uint8_t dtypes[capacity];        // key * 3 + query; low_precision * 3 + query
  void* low_precision[kLowPrecision ? capacity : 1];
  int32_t count;
};
template <typename Table>
constexpr bool kFits = sizeof(Table) + sizeof(float) + sizeof(const float*) <= 32764;
static_assert(kFits<TensorTable<kTensors, false>> && kFits<TensorTable<kLowPrecisionTensors, true>>);

template <int width, typename Key, typename Query, typename LowPrecision>
__device__ __forceinline__ void update_vectors(Key* key, const Query* query, LowPrecision* low_precision, int n,
                                               float keep, float take) {
  constexpr int kVectors = kChunk / (kThreads * width);
  Packed<width, Key> k[kVectors];
  Packed<width, Query> q[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {  // all loads before the first use; unpacking here would wait for each
    const int at = (i * kThreads + static_cast<int>(threadIdx.x)) * width;
    if (at >= n) continue;
    k[i] = load_packed<width>(key + at);
    q[i] = load_packed<width>(query + at);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = (i * kThreads + static_cast<int>(threadIdx.x)) * width;
    if (at >= n) continue;
    float a[width], b[width];
    unpack<width, Key>(k[i], a);
    unpack<width, Query>(q[i], b);
#pragma unroll
    for (int j = 0; j < width; ++j) a[j] = fmaf(keep, a[j], take * b[j]);
    store_floats<width>(key + at, a);
    if constexpr (!std::is_void_v<LowPrecision>) store_floats<width>(low_precision + at, a);
  }
}

// One chunk: key, query, low_precision [n]; LowPrecision is void if there is no copy.
template <typename Key, typename Query, typename LowPrecision>
__device__ __forceinline__ void update_chunk(Key* key, const Query* query, LowPrecision* low_precision, int n,
                                             float keep, float take) {
  constexpr int kWidth = kVectorWidth<Key, Query>;
  int done = 0;
  bool aligned = is_aligned<kWidth>(key) && is_aligned<kWidth>(query);
  if constexpr (!std::is_void_v<LowPrecision>) aligned &= is_aligned<kWidth>(low_precision);
  if (aligned) {
    done = n - n % kWidth;
    update_vectors<kWidth>(key, query, low_precision, done, keep, take);
  }
#pragma unroll 4
  for (int at = done + static_cast<int>(threadIdx.x); at < n; at += kThreads) {
    const float moved = fmaf(keep, to_float(key[at]), take * to_float(query[at]));
    key[at] = from_float<Key>(moved);
    if constexpr (!std::is_void_v<LowPrecision>) low_precision[at] = from_float<LowPrecision>(moved);
  }
}

template <typename Key, typename LowPrecision>
__device__ __forceinline__ void update_chunk(void* key, const void* query, void* low_precision, int query_dtype,
                                             int64_t begin, int n, float keep, float take) {
  Key* const k = static_cast<Key*>(key) + begin;
  LowPrecision* s = static_cast<LowPrecision*>(low_precision);
  if constexpr (!std::is_void_v<LowPrecision>) s += begin;
  switch (static_cast<Dtype>(query_dtype)) {
    case Dtype::kFloat32:
      return update_chunk(k, static_cast<const float*>(query) + begin, s, n, keep, take);
    case Dtype::kBFloat16:
      return update_chunk(k, static_cast<const __nv_bfloat16*>(query) + begin, s, n, keep, take);
    case Dtype::kFloat16:
      return update_chunk(k, static_cast<const __half*>(query) + begin, s, n, keep, take);
  }
}

template <int capacity, bool kLowPrecision>
__global__ __launch_bounds__(kThreads, 4) void momentum_update_kernel(
    const __grid_constant__ TensorTable<capacity, kLowPrecision> tensors, float m, const float* m_ptr) {
  int t = 0;  // the last tensor whose first chunk is this block or an earlier one
  if constexpr (capacity > 1) {
    int end = tensors.count;
    while (end - t > 1) {
      const int middle = (t + end) / 2;
      (tensors.first_chunk[middle] <= blockIdx.x ? t : end) = middle;
    }
  }
  const int64_t begin = int64_t{blockIdx.x - tensors.first_chunk[t]} * kChunk;
  const int64_t left = tensors.numel[t] - begin;
  const int n = left < kChunk ? static_cast<int>(left) : kChunk;
  const float keep = m_ptr != nullptr ? *m_ptr : m;
  const float take = 1.0f - keep;
  const int query_dtype = tensors.dtypes[t] % 3;
  const auto update = [&]<typename Key, typename LowPrecision>() {
    void* const low_precision = kLowPrecision ? tensors.low_precision[kLowPrecision ? t : 0] : nullptr;
    update_chunk<Key, LowPrecision>(tensors.key[t], tensors.query[t], low_precision, query_dtype, begin, n, keep, take);
  };
  const auto other = static_cast<Dtype>(tensors.dtypes[t] / 3);
  if constexpr (kLowPrecision) {
    if (other == Dtype::kBFloat16) return update.template operator()<float, __nv_bfloat16>();
    return update.template operator()<float, __half>();
  } else {
    if (other == Dtype::kFloat32) return update.template operator()<float, void>();
    if (other == Dtype::kBFloat16) return update.template operator()<__nv_bfloat16, void>();
    return update.template operator()<__half, void>();
  }
}

// ---- launcher

// Launches for the first `capacity` tensors that have elements, and advances `tensors` past them.
template <int capacity, bool kLowPrecision>
cudaError_t launch_some(const MomentumTensor*& tensors, const MomentumTensor* end, float m, const float* m_ptr,
                        cudaStream_t stream) {
  TensorTable<capacity, kLowPrecision> table;
  table.count = 0;
  int64_t chunks = 0;
  for (; tensors != end && table.count < capacity; ++tensors) {
    if (tensors->numel == 0) continue;
    const int64_t more = (tensors->numel + kChunk - 1) / kChunk;
    if (chunks + more > INT32_MAX) break;  // the largest grid: 8.8e12 elements
    const int t = table.count++;
    table.key[t] = tensors->key;
    table.query[t] = tensors->query;
    table.numel[t] = tensors->numel;
    table.first_chunk[t] = static_cast<uint32_t>(chunks);
    const Dtype other = kLowPrecision ? tensors->low_precision_dtype : tensors->key_dtype;
    table.dtypes[t] = static_cast<uint8_t>(static_cast<int>(other) * 3 + static_cast<int>(tensors->query_dtype));
    if constexpr (kLowPrecision) table.low_precision[t] = tensors->low_precision;
    chunks += more;
  }
  if (table.count == 0) return tensors == end ? cudaSuccess : cudaErrorInvalidValue;
  return launch(momentum_update_kernel<capacity, kLowPrecision>, static_cast<unsigned>(chunks), kThreads, 0, stream,
                table, m, m_ptr);
}

}  // namespace

cudaError_t momentum_update(const MomentumTensor* tensors, int64_t count, float m, const float* m_ptr,
                            cudaStream_t stream) {
  const MomentumTensor* const end = tensors + count;
  const bool low_precision = count > 0 && tensors->low_precision != nullptr;
  while (tensors != end) {
    // A smaller table is cheaper to launch: flattened parameters need one entry.
    const int64_t left = end - tensors;
    cudaError_t error = cudaSuccess;
    if (low_precision) {
      error = left == 1 ? launch_some<1, true>(tensors, end, m, m_ptr, stream)
                        : launch_some<kLowPrecisionTensors, true>(tensors, end, m, m_ptr, stream);
    } else {
      error = left == 1    ? launch_some<1, false>(tensors, end, m, m_ptr, stream)
              : left <= 64 ? launch_some<64, false>(tensors, end, m, m_ptr, stream)
                           : launch_some<kTensors, false>(tensors, end, m, m_ptr, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace moco_ext::cuda
