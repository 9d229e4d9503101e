// The InfoNCE pass over the queue for any C and any alignment, in float32 arithmetic.
//
// A block handles kGenericRows queries and one split of the queue. Its sums of p n are in the workspace, so that shared
// memory and registers do not grow with C.
#pragma once

#include "kernels/cuda/info_nce_rows.cuh"

namespace moco_ext::cuda {

constexpr int kGenericThreads = 256;
constexpr int kGenericColumns = 32;  // columns of the contraction in shared memory at a time
constexpr int kGenericItemRows = 4;  // rows that a thread accumulates for each element of a key it loads
static_assert(kGenericThreads == kGenericRows * kGenericKeys / 2 && kGenericKeys == 32);

template <typename Queue>
__global__ void __launch_bounds__(kGenericThreads, 2)
    info_nce_generic_kernel(const Queue* queue, InfoNceKeyCount count, InfoNceMask mask, InfoNcePartials partials,
                            int64_t n, int64_t c, InfoNceTemperature temperature, InfoNceWorkspace workspace) {
  __shared__ float query[kGenericRows][kGenericColumns + 1];  // padding: elements of a column are in distinct banks
  __shared__ float key[kGenericKeys][kGenericColumns + 1];
  __shared__ float scores[kGenericRows][kGenericKeys];
  __shared__ float rescale[kGenericRows];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * kGenericRows;
  const auto slot = [&](int64_t row) { return partials.slot(block_row + row, blockIdx.y); };
  const int64_t k = count.value();
  const int64_t tiles = (k + kGenericKeys - 1) / kGenericKeys;
  const int64_t first_tile = tiles * blockIdx.y / gridDim.y;
  const int64_t end_tile = tiles * (blockIdx.y + 1) / gridDim.y;
  const float* const operand = static_cast<const float*>(workspace.query) + block_row * c;
  const float scale = 1.44269504f / temperature.value();

  // Softmax state: warp w keeps rows w and w + 8. All lanes hold the same max; sum and rank cover a lane's keys.
  constexpr int kWarps = kGenericThreads / 32;
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {};
  uint32_t row_rank[2] = {};

  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t tile_key = tile * kGenericKeys;
    const int keys = static_cast<int>(min(k - tile_key, kGenericKeys));

    float score[2] = {};  // of row thread / 16 and keys thread % 16, thread % 16 + 16
    for (int64_t column = 0; column < c; column += kGenericColumns) {
      __syncthreads();  // all threads have read the previous columns
      for (int i = thread; i < (kGenericRows + kGenericKeys) * kGenericColumns; i += kGenericThreads) {
        const int row = i / kGenericColumns;
        const int64_t at = column + i % kGenericColumns;
        if (row < kGenericRows) {
          query[row][i % kGenericColumns] = at < c ? operand[row * c + at] : 0.0f;
        } else {
          const int tile_row = row - kGenericRows;
          key[tile_row][i % kGenericColumns] =
              tile_row < keys && at < c ? to_float(queue[(tile_key + tile_row) * c + at]) : 0.0f;
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kGenericColumns; ++i) {
        score[0] += query[thread / 16][i] * key[thread % 16][i];
        score[1] += query[thread / 16][i] * key[thread % 16 + 16][i];
      }
    }
    for (int i = 0; i < 2; ++i) {
      const int column = thread % 16 + 16 * i;
      scores[thread / 16][column] = column < keys ? score[i] : -INFINITY;
    }
    __syncthreads();

    for (int r = 0; r < 2; ++r) {
      const int row = warp + kWarps * r;
      float s = scores[row][lane];
      bool is_negative = true;
      if (mask.any() && lane < keys && block_row + row < n) {
        const bool same_id = mask.same_id(block_row + row, tile_key + lane);
        is_negative = !same_id;
        if (mask.is_positive(block_row + row, tile_key + lane) || (same_id && !mask.same_id_positive)) s = -INFINITY;
      }
      const float max = fmaxf(row_max[r], warp_join(s, Max{}));
      const float shift = max == -INFINITY ? 0.0f : max;  // -inf - -inf would be NaN
      const float factor = exp2f((row_max[r] - shift) * scale);
      const float p = exp2f((s - shift) * scale);
      row_sum[r] = row_sum[r] * factor + p;
      row_rank[r] += is_negative && s > workspace.positive[block_row + row];
      row_max[r] = max;
      scores[row][lane] = p;
      if (lane == 0) rescale[row] = factor;
    }
    __syncthreads();

    if (partials.keys != nullptr) {
      for (int64_t item = thread; item < c * (kGenericRows / kGenericItemRows); item += kGenericThreads) {
        const int64_t column = item % c;
        const int row = static_cast<int>(item / c) * kGenericItemRows;
        float sum[kGenericItemRows] = {};
        for (int i = 0; i < keys; ++i) {
          const float element = to_float(queue[(tile_key + i) * c + column]);
#pragma unroll
          for (int j = 0; j < kGenericItemRows; ++j) sum[j] += scores[row + j][i] * element;
        }
        for (int j = 0; j < kGenericItemRows; ++j) {
          if (block_row + row + j >= n) break;
          float* const total = partials.keys + slot(row + j) * partials.pitch + column;
          *total = tile == first_tile ? sum[j] : *total * rescale[row + j] + sum[j];
        }
      }
    }
    // The first barrier of the next tile separates these reads of scores and rescale from the next writes.
  }

  if (first_tile == end_tile && partials.keys != nullptr) {  // fewer tiles than splits
    const int64_t rows = min(n - block_row, kGenericRows);
    for (int64_t i = thread; i < rows * c; i += kGenericThreads) {
      partials.keys[slot(i / c) * partials.pitch + i % c] = 0.0f;
    }
  }
  for (int r = 0; r < 2; ++r) {
    const int row = warp + kWarps * r;
    const float sum = warp_join(row_sum[r], Add{});
    const uint32_t rank = warp_join(row_rank[r], Add{});
    if (lane == 0 && block_row + row < n) {
      partials.max[slot(row)] = row_max[r];
      partials.sum[slot(row)] = sum;
      partials.rank[slot(row)] = rank;
    }
  }
}

}  // namespace moco_ext::cuda
