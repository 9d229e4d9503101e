// Sums of keys that target distributions other than the positive alone need: of all keys, for label smoothing, and of
// the keys with a row's id. Both are in a fixed order.
#pragma once

#include "kernels/cuda/info_nce_rows.cuh"

namespace moco_ext::cuda {

// A source of keys: the queue or the batch.
template <typename Key>
struct InfoNceSource {
  const Key* keys;  // [K, C], or null if there are none
  InfoNceKeyCount count;
  const int64_t* ids;  // [K] or null
  int64_t key_offset;  // as in InfoNceMask

  // With ids, NaN counts as 0 here: the key may be masked out, and rows that do see it have a score of NaN.
  __device__ float summand(int64_t i) const {
    const float value = to_float(keys[i]);
    return ids != nullptr && !isfinite(value) ? 0.0f : value;
  }
};

// parts [gridDim.y, C]: the sum over each block's share of the rows of both sources. A thread per column.
template <typename Queue, typename Operand>
__global__ void info_nce_column_parts_kernel(InfoNceSource<Queue> queue, InfoNceSource<Operand> batch, int64_t c,
                                             float* parts) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= c) return;
  float sum = 0.0f;
  const auto add = [&](const auto& source) {
    if (source.keys == nullptr) return;
    const int64_t k = source.count.value();
    for (int64_t j = k * blockIdx.y / gridDim.y; j < k * (blockIdx.y + 1) / gridDim.y; ++j) {
      sum += source.summand(j * c + column);
    }
  };
  add(queue);
  add(batch);
  parts[blockIdx.y * c + column] = sum;
}

// parts [kColumnParts, C] -> sum [C]
static __global__ void info_nce_column_sum_kernel(const float* parts, int64_t c, float* sum) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= c) return;
  float total = 0.0f;
  for (int64_t i = 0; i < kColumnParts; ++i) total += parts[i * c + column];
  sum[column] = total;
}

constexpr int kMatchThreads = 256;

// match_sum [N, C], matches [N]: a block per row scans all ids and adds up the matching keys in order.
template <typename Queue, typename Operand>
__global__ void __launch_bounds__(kMatchThreads)
    info_nce_match_kernel(InfoNceSource<Queue> queue, InfoNceSource<Operand> batch, const int64_t* row_ids, int64_t c,
                          InfoNceWorkspace workspace) {
  __shared__ unsigned found[kMatchThreads / 32];  // a bit for each key of the chunk
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  float* const sum = workspace.match_sum + row * c;
  for (int64_t i = thread; i < c; i += kMatchThreads) sum[i] = 0.0f;
  int64_t matches = 0;
  const auto gather = [&](const auto& source) {
    if (source.keys == nullptr || source.ids == nullptr) return;
    const InfoNceMask mask{row_ids, source.ids, source.key_offset, false, false};
    const int64_t k = source.count.value();
#pragma unroll 1
    for (int64_t first = 0; first < k; first += kMatchThreads) {
      const int64_t key = first + thread;
      const bool match = key < k && mask.same_id(row, key) && !mask.is_positive(row, key);
      const unsigned bits = __ballot_sync(0xffffffffu, match);
      __syncthreads();  // all threads have read the previous chunk
      if (thread % 32 == 0) found[thread / 32] = bits;
      __syncthreads();
#pragma unroll 1
      for (int w = 0; w < kMatchThreads / 32; ++w) {
        for (unsigned left = found[w]; left != 0; left &= left - 1) {
          const int64_t j = first + w * 32 + __ffs(static_cast<int>(left)) - 1;
#pragma unroll 1
          for (int64_t i = thread; i < c; i += kMatchThreads) sum[i] += source.summand(j * c + i);
          ++matches;
        }
      }
    }
  };
  gather(queue);
  gather(batch);
  if (thread == 0) workspace.matches[row] = matches;
}

// A masked key has weight 0, but 0 * NaN is NaN. Rows whose sums are not finite are summed again, over the keys that
// they see. A block per row; most find nothing to do.
template <typename Queue, typename Operand>
__global__ void __launch_bounds__(kMatchThreads, 2)  // without the 2, ptxas spills on some architectures
    info_nce_repair_kernel(InfoNceSource<Queue> queue, InfoNceSource<Operand> batch, const int64_t* row_ids,
                           bool same_id_positive, bool same_id_only, int64_t c, InfoNceTemperature temperature,
                           InfoNceWorkspace workspace) {
  constexpr int kChunk = 64;  // keys
  __shared__ float weights[kChunk];
  __shared__ bool masked[kChunk];
  __shared__ int broken;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int64_t row = blockIdx.x;
  const InfoNcePartials& partials = workspace.partials;
  const auto expected = [&](int64_t split) { return partials.keys + partials.slot(row, split) * partials.pitch; };
  const int64_t splits = workspace.splits;

  if (thread == 0) broken = 0;
  __syncthreads();
  bool finite = true;
  for (int64_t i = thread; i < c; i += kMatchThreads) {
    for (int64_t split = 0; split < splits; ++split) finite = finite && isfinite(expected(split)[i]);
  }
  if (!finite) broken = 1;
  __syncthreads();
  if (broken == 0) return;

  const float* const maxima = partials.max + partials.slot(row, 0);
  int64_t largest = 0;  // the split with the row's maximum gets the sum
  for (int64_t split = 1; split < splits; ++split) {
    if (maxima[split] > maxima[largest]) largest = split;
  }
  const float max = maxima[largest];
  const float scale = workspace.row_scale[row] * 1.44269504f / temperature.value();
  for (int64_t i = thread; i < c; i += kMatchThreads) {
    for (int64_t split = 0; split < splits; ++split) expected(split)[i] = 0.0f;
  }
  const Operand* const query = static_cast<const Operand*>(workspace.query) + row * c;
  const auto add = [&](const auto& source) {
    if (source.keys == nullptr) return;
    const InfoNceMask mask{row_ids, source.ids, source.key_offset, same_id_positive, same_id_only};
    const int64_t k = source.count.value();
    for (int64_t first = 0; first < k; first += kChunk) {
      const int count = static_cast<int>(min(k - first, int64_t{kChunk}));
      for (int j = thread / 32; j < count; j += kMatchThreads / 32) {
        const auto* const key = source.keys + (first + j) * c;
        float score = 0.0f;
        for (int64_t i = lane; i < c; i += 32) score += to_float(query[i]) * to_float(key[i]);
        score = warp_join(score, Add{});
        const bool positive = mask.is_positive(row, first + j);
        if (lane != 0) continue;
        weights[j] = exp2f((score - max) * scale);
        masked[j] = positive || (!mask.same_id_positive && mask.same_id(row, first + j));
      }
      __syncthreads();
      for (int64_t i = thread; i < c; i += kMatchThreads) {
        for (int j = 0; j < count; ++j) {
          if (!masked[j]) expected(largest)[i] += weights[j] * to_float(source.keys[(first + j) * c + i]);
        }
      }
      __syncthreads();  // the next chunk overwrites the weights
    }
  };
  add(queue);
  add(batch);
}

}  // namespace moco_ext::cuda
