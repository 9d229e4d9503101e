// The last InfoNCE kernel: adds up the splits of the passes, then the positive, and propagates the gradients.
#pragma once

#include <cmath>

#include "kernels/cuda/info_nce_query.cuh"

namespace moco_ext::cuda {

constexpr int kCombineColumns = 128;
constexpr int kCombineMaxWarps = 16;

// reduced [1]: the sum or mean of loss [N], which the last block to get here computes, in a fixed order.
// grad_temperature likewise. All of a block's threads call it.
static __device__ void reduce_rows(const InfoNceOutputs& outputs, const InfoNceWorkspace& workspace, int64_t n) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {  // the thread that has written the row's results
    __threadfence();
    is_last = atomicAdd(workspace.partials.finished, 1u) == n - 1;
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

// A block per row.
static __global__ void __launch_bounds__(32 * kCombineMaxWarps)
    info_nce_combine_kernel(InfoNceQueries queries, InfoNceTemperature temperature, InfoNceTarget target,
                            InfoNceWorkspace workspace, InfoNceOutputs outputs) {
  __shared__ float parts[kCombineMaxWarps][kCombineColumns];
  const int64_t row = blockIdx.x;
  const int64_t n = queries.n;
  const int64_t c = queries.c;
  const int64_t splits = workspace.splits;
  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const InfoNcePartials& partials = workspace.partials;
  const QueryFacts facts = block_query_facts(queries, row);  // the same scale as in the passes, up to rounding
  const float inverse_temperature = 1.0f / temperature.value();
  const float scale = facts.scale * 1.44269504f * inverse_temperature;
  wait_for_previous_kernel();

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
  const float positive = facts.positive;
  const float gap = (max * facts.scale - positive) * inverse_temperature;
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
  const float inverse_query = 1.0f / queries.divisor(facts.query_norm);
  const float inverse_key = 1.0f / queries.divisor(facts.key_norm);
  const auto unit_query = [&](int64_t i) { return element(queries.query, queries.dtype, row * c + i) * inverse_query; };
  const auto unit_key = [&](int64_t i) { return element(queries.key, queries.dtype, row * c + i) * inverse_key; };
  const float row_weight = outputs.reduction == Reduction::kMean ? 1.0f / static_cast<float>(n) : 1.0f;

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
      excess -= unit_query(i) * target_less_key(i, unit_key(i));
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
        dot += total * unit_query(first + i);
      }
      __syncthreads();  // before the next columns overwrite parts
    }
    dot = block_join(dot, Add{});
    // q . d loss / d q
    const float unit_dot = (key_weight * dot - rest * positive + excess) * inverse_temperature;
    for (int64_t i = thread; i < c; i += threads) {
      const float q = unit_query(i);
      const float k = unit_key(i);
      float g = key_weight * gradient[i] - rest * k;
      if (!target.plain) g -= target_less_key(i, k);
      g *= inverse_temperature;
      if (queries.normalize && facts.query_norm > queries.eps) g -= unit_dot * q;  // a clamped norm is a constant
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
      const float q = unit_query(i);
      const float k = unit_key(i);
      float g = -rest * q * inverse_temperature;
      if (queries.normalize && facts.key_norm > queries.eps) g -= unit_dot * k;
      outputs.grad_key[row * c + i] = g * (inverse_key * row_weight);
    }
  }
  if (outputs.reduction != Reduction::kNone) reduce_rows(outputs, workspace, n);
}

}  // namespace moco_ext::cuda
