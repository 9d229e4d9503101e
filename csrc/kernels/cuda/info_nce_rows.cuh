// The InfoNCE kernels over rows: `prepare` before the pass over the queue, `combine` after it.
#pragma once

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

// Over a block of at most 32 warps, in a fixed order; every thread gets the result.
template <typename T, typename Join>
__device__ __forceinline__ T block_join(T x, Join join) {
  __shared__ T parts[32];
  x = warp_join(x, join);
  __syncthreads();  // all threads have read the previous result
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (unsigned i = 1; i < blockDim.x / 32; ++i) x = join(x, parts[i]);
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
__device__ __forceinline__ float warp_norm(const T* x, int64_t c, float square, int lane) {
  const float norm = sqrtf(warp_join(square, Add{}));
  if (!isinf(norm)) return norm;
  square = 0.0f;  // the square overflows, the norm may not
  for (int64_t i = lane; i < c; i += 32) square += to_float(x[i]) * 0x1p-80f * (to_float(x[i]) * 0x1p-80f);
  return sqrtf(warp_join(square, Add{})) * 0x1p80f;
}

// What prepare writes about the rows of x; null: not wanted.
template <typename Operand>
struct InfoNceOperand {
  Operand* rows;                 // [padded, C] x, as unit rows if normalize, divided by row_scale; the padding is 0
  float* norm;                   // [N]
  float* key_norm = nullptr;     // [N] of the rows' keys; all that follows needs them
  float* positive = nullptr;     // [padded] x . key
  float* row_scale = nullptr;    // [padded]
  unsigned* finished = nullptr;  // [1] set to 0
};

// x and, where the operand is that of queries, their keys [N, C]. A warp per row.
template <typename T, typename Operand>
__global__ void info_nce_prepare_kernel(const T* x, const T* key, RowOptions options, int64_t padded,
                                        InfoNceOperand<Operand> operand) {
  let_next_kernel_start();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= padded) return;
  const bool has_key = operand.positive != nullptr;
  if (row == 0 && lane == 0 && has_key) *operand.finished = 0;
  Operand* const to = operand.rows + row * options.c;
  if (row >= options.n) {  // padding: computed with the rest of its block, but not written to the outputs
    for (int64_t i = lane; i < options.c; i += 32) to[i] = from_float<Operand>(0.0f);
    if (lane == 0 && has_key) {
      operand.positive[row] = 0.0f;
      operand.row_scale[row] = 1.0f;
    }
    return;
  }
  x += row * options.c;
  if (has_key) key += row * options.c;
  float square = 0.0f;
  float key_square = 0.0f;
  float largest = 0.0f;
  for (int64_t i = lane; i < options.c; i += 32) {
    const float value = to_float(x[i]);
    square += value * value;
    largest = fmaxf(largest, fabsf(value));
    if (has_key) key_square += to_float(key[i]) * to_float(key[i]);
  }
  const float norm = warp_norm(x, options.c, square, lane);
  const float divisor = options.divisor(norm);
  const float key_norm = has_key ? warp_norm(key, options.c, key_square, lane) : 1.0f;
  const float key_divisor = options.divisor(key_norm);

  // Scaling by a power of two is exact, and keeps rows of any norm within the range of fp16.
  int exponent = 0;
  largest = warp_join(largest, Max{}) / divisor;
  if (has_key && !std::is_same_v<Operand, float> && largest > 0.0f && largest < INFINITY) {
    frexpf(largest, &exponent);
    exponent = min(max(exponent, -100), 100);
  }
  float positive = 0.0f;
  for (int64_t i = lane; i < options.c; i += 32) {
    const float value = to_float(x[i]) / divisor;
    to[i] = from_float<Operand>(ldexpf(value, -exponent));
    if (has_key) positive += value * (to_float(key[i]) / key_divisor);
  }
  if (lane == 0 && operand.norm != nullptr) operand.norm[row] = norm;
  if (!has_key) return;
  positive = warp_join(positive, Add{});
  if (lane == 0) {
    operand.key_norm[row] = key_norm;
    operand.positive[row] = positive;
    operand.row_scale[row] = ldexpf(1.0f, exponent);
  }
}

constexpr int kCombineColumns = 128;
constexpr int kCombineMaxWarps = 16;

// reduced [1]: the sum or mean of loss [N], which the last block to get here computes, in a fixed order.
// grad_temperature likewise. All of a block's threads call it.
static __device__ void reduce_rows(const InfoNceOutputs& outputs, const InfoNceWorkspace& workspace, int64_t n) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {  // the thread that has written the row's results
    __threadfence();
    is_last = atomicAdd(workspace.finished, 1u) == n - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  const auto sum = [&](const float* rows) {
    float total = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) total += __ldcg(rows + i);  // not from this processor's L1
    return block_join(total, Add{});
  };
  const float loss = sum(outputs.loss);
  if (threadIdx.x == 0) *outputs.reduced = outputs.reduction == Reduction::kMean ? loss / static_cast<float>(n) : loss;
  if (outputs.grad_temperature == nullptr) return;
  const float grad_temperature = sum(workspace.grad_temperature);
  if (threadIdx.x == 0) *outputs.grad_temperature = grad_temperature;
}

// A block per row: adds up the splits in a fixed order, then the positive, and propagates the gradients through the
// norms.
template <typename Query>
__global__ void __launch_bounds__(32 * kCombineMaxWarps)
    info_nce_combine_kernel(const Query* query, const Query* key, RowOptions options, InfoNceTemperature temperature,
                            InfoNceTarget target, InfoNceWorkspace workspace, InfoNceOutputs outputs) {
  wait_for_previous_kernel();
  __shared__ float parts[kCombineMaxWarps][kCombineColumns];
  const int64_t row = blockIdx.x;
  const int64_t n = options.n;
  const int64_t c = options.c;
  const int64_t splits = workspace.splits;
  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const InfoNcePartials& partials = workspace.partials;
  const float inverse_temperature = 1.0f / temperature.value();
  const float row_scale = workspace.row_scale[row];
  const float scale = row_scale * 1.44269504f * inverse_temperature;

  float max = -INFINITY;
  for (int64_t i = thread; i < splits; i += threads) max = fmaxf(max, partials.max[i * n + row]);
  max = block_join(max, Max{});
  const float shift = max == -INFINITY ? 0.0f : max;  // -inf - -inf would be NaN
  const auto weight = [&](int64_t split) { return exp2f((partials.max[split * n + row] - shift) * scale); };
  float negatives = 0.0f;  // relative to the maximum
  long long rank = 0;      // NOLINT: a type that shuffles accept
  for (int64_t i = thread; i < splits; i += threads) {
    negatives += weight(i) * partials.sum[i * n + row];
    rank += partials.rank[i * n + row];
  }
  negatives = block_join(negatives, Add{});
  rank = block_join(rank, Add{});

  // Everything is relative to the positive's logit or the negatives' largest, whichever is larger, so that nothing
  // cancels in a loss near 0 or in 1 - p0. NaN takes the second branch, which propagates it.
  const float positive = workspace.positive[row];
  const float gap = (max * row_scale - positive) * inverse_temperature;
  float loss;
  float key_weight;  // of the sum of p n
  float rest;        // 1 - p0
  if (gap <= 0.0f) {
    const float factor = expf(gap);
    loss = log1pf(negatives * factor);
    key_weight = factor / (1.0f + negatives * factor);
    rest = negatives * key_weight;
  } else {
    const float total = negatives + expf(-gap);
    loss = gap + logf(total);
    key_weight = 1.0f / total;
    rest = negatives / total;
  }
  const float query_norm = workspace.query_norm[row];
  const float key_norm = workspace.key_norm[row];
  const float inverse_query = 1.0f / options.divisor(query_norm);
  const float inverse_key = 1.0f / options.divisor(key_norm);
  const float row_weight = outputs.reduction == Reduction::kMean ? 1.0f / static_cast<float>(n) : 1.0f;
  query += row * c;
  key += row * c;

  // A target distribution other than the key alone: only the difference from the key is added.
  float share = 1.0f;   // of each positive
  float floor = 0.0f;   // of each class
  float excess = 0.0f;  // of the positive's score over the target's
  if (!target.plain) {
    const long long matches = target.match_sum == nullptr ? 0 : target.matches[row];                   // NOLINT
    const long long queue_keys = target.queue_keys.value();                                            // NOLINT
    const long long classes = 1 + queue_keys + (target.batch_keys == 0 ? 0 : target.batch_keys - 1) -  // NOLINT
                              (target.same_id_positive ? 0 : matches);
    if (classes > 1) {  // a positive without negatives has the whole target, exactly: its gradient is 0
      share = (1.0f - target.label_smoothing) / static_cast<float>(1 + (target.same_id_positive ? matches : 0));
      floor = target.label_smoothing / static_cast<float>(classes);
    }
  }
  const auto target_less_key = [&](int64_t i, float k) {  // element i, k being the key's
    const float matched = target.match_sum == nullptr ? 0.0f : target.match_sum[row * c + i];
    float t = (share - 1.0f) * k;
    if (target.same_id_positive) t += share * matched;
    if (target.column_sum != nullptr) {
      t += floor *
           (target.column_sum[i] + (target.batch_keys == 0 ? k : 0.0f) - (target.same_id_positive ? 0.0f : matched));
    }
    return t;
  };
  if (!target.plain) {
    for (int64_t i = thread; i < c; i += threads) {
      excess -= to_float(query[i]) * inverse_query * target_less_key(i, to_float(key[i]) * inverse_key);
    }
    excess = block_join(excess, Add{});
  }
  if (thread == 0) {
    const float positive_logit = positive * inverse_temperature;
    const float row_loss = loss + excess * inverse_temperature;
    outputs.loss[row] = row_loss;
    if (outputs.reduction == Reduction::kNone && outputs.reduced != nullptr) outputs.reduced[row] = row_loss;
    outputs.lse[row] = loss + positive_logit;
    outputs.positive_logit[row] = positive_logit;
    outputs.rank[row] = rank;
    if (outputs.weights != nullptr) {
      outputs.weights[3 * row] = share;
      outputs.weights[3 * row + 1] = floor;
      outputs.weights[3 * row + 2] = 1.0f - (share + floor) - rest;
    }
  }

  if (outputs.grad_query != nullptr) {
    float* const gradient = outputs.grad_query + row * c;
    float dot = 0.0f;  // query . sum of p n; `gradient` holds that sum until dot is known
    for (int64_t first = 0; first < c; first += kCombineColumns) {
      float sum[kCombineColumns / 32] = {};
      for (int64_t split = warp; split < splits; split += threads / 32) {
        const float w = weight(split);
        const float* const keys = partials.keys + (split * n + row) * c + first;
#pragma unroll
        for (int i = 0; i < kCombineColumns / 32; ++i) {
          if (first + lane + 32 * i < c) sum[i] += w * keys[lane + 32 * i];
        }
      }
#pragma unroll
      for (int i = 0; i < kCombineColumns / 32; ++i) parts[warp][lane + 32 * i] = sum[i];
      __syncthreads();
      for (int i = thread; i < kCombineColumns && first + i < c; i += threads) {
        float total = parts[0][i];
        for (int w = 1; w < threads / 32; ++w) total += parts[w][i];
        gradient[first + i] = total;
        dot += total * (to_float(query[first + i]) * inverse_query);
      }
      __syncthreads();  // before the next columns overwrite parts
    }
    dot = block_join(dot, Add{});
    // q . d loss / d q
    const float unit_dot = (key_weight * dot - rest * positive + excess) * inverse_temperature;
    for (int64_t i = thread; i < c; i += threads) {
      const float q = to_float(query[i]) * inverse_query;
      const float k = to_float(key[i]) * inverse_key;
      float g = key_weight * gradient[i] - rest * k;
      if (!target.plain) g -= target_less_key(i, k);
      g *= inverse_temperature;
      if (options.normalize && query_norm > options.eps) g -= unit_dot * q;  // a clamped norm is a constant
      gradient[i] = g * (inverse_query * row_weight);
    }
    if (thread == 0 && outputs.grad_temperature != nullptr) {
      float* const rows = outputs.reduction == Reduction::kNone ? outputs.grad_temperature : workspace.grad_temperature;
      rows[row] = -unit_dot * inverse_temperature * row_weight;
    }
  }
  if (outputs.grad_key != nullptr) {
    rest -= 1.0f - (share + floor);  // its weight in the target less its probability
    const float unit_dot = -rest * positive * inverse_temperature;
    for (int64_t i = thread; i < c; i += threads) {
      const float q = to_float(query[i]) * inverse_query;
      const float k = to_float(key[i]) * inverse_key;
      float g = -rest * q * inverse_temperature;
      if (options.normalize && key_norm > options.eps) g -= unit_dot * k;
      outputs.grad_key[row * c + i] = g * (inverse_key * row_weight);
    }
  }
  if (outputs.reduction != Reduction::kNone) reduce_rows(outputs, workspace, n);
}

}  // namespace moco_ext::cuda
