// The InfoNCE kernel after the passes, `combine`: adds up the splits of each row, and finishes loss and gradients.
//
// It waits for memory and for its own instructions rather than for arithmetic, so everything that it reads is in flight
// at once, and a row's threads all compute the row's few scalars themselves.
#pragma once

#include "kernels/cuda/info_nce_rows.cuh"

namespace moco_ext::cuda {

constexpr int kCombineColumns = 128;  // of a warp: four of each lane
constexpr int kCombineSplits = 8;     // that a warp loads at once
constexpr int kCombineWarps = 16;     // of a block, at most

// A row has split_groups * column_groups warps. Those of a split group divide the columns, `span` at a time.
struct CombineShape {
  int column_groups;
  int split_groups;
  int rows;  // of a block
  __host__ __device__ int row_warps() const { return column_groups * split_groups; }
  __host__ __device__ int span() const { return column_groups * kCombineColumns; }
};

inline CombineShape combine_shape(int64_t n, int64_t columns, int64_t splits) {
  const auto limited = [](int64_t x, int64_t most) { return static_cast<int>(x < 1 ? 1 : x > most ? most : x); };
  CombineShape shape{};
  shape.column_groups = limited((columns + kCombineColumns - 1) / kCombineColumns, 8);
  shape.split_groups =
      limited(columns == 0 ? 1 : (splits + kCombineSplits - 1) / kCombineSplits, kCombineWarps / shape.column_groups);
  shape.rows = limited(n / 256, kCombineWarps / 2 / shape.row_warps());  // few rows: more blocks than multiprocessors
  return shape;
}

// Weights and results of a row that all of its threads know.
struct RowResults {
  float loss;        // before the target
  float key_weight;  // of the sum of p n
  float own;         // p0, the probability of the row's own key, or 0
  float rest;        // 1 - p0
};

// gap: of the negatives' largest logit over the anchor's. negatives: the sum of their p, relative to that logit.
// Everything is relative to the anchor's logit or the negatives' largest, whichever is larger, so that nothing cancels
// in a loss near 0 or in 1 - p0. NaN takes the second branch, which propagates it.
static __device__ __forceinline__ RowResults row_results(float gap, float negatives, bool candidate) {
  RowResults x{};
  if (gap <= 0.0f && candidate) {
    const float factor = expf(gap);
    x.loss = log1pf(negatives * factor);
    x.own = 1.0f / (1.0f + negatives * factor);
    x.key_weight = factor * x.own;
    x.rest = negatives * x.key_weight;
  } else {
    x.own = candidate ? expf(-gap) : 0.0f;
    const float total = negatives + x.own;
    x.loss = gap + logf(total);
    x.key_weight = total == 0.0f ? 0.0f : 1.0f / total;  // without a candidate the loss is -inf, its gradient 0
    x.own *= x.key_weight;
    x.rest = total == 0.0f ? 1.0f : negatives / total;
  }
  return x;
}

// A target distribution other than the anchor: only the difference is added.
struct RowTarget {
  float share = 1.0f;        // of each positive
  float floor = 0.0f;        // of each class
  bool no_positive = false;  // then the row has no loss
  // Element i of the target's mean key less the anchor's, which is k.
  __device__ float less_anchor(const InfoNceTarget& target, int64_t at, int i, float k) const {
    if (target.given != nullptr) return target.given[at] - k;
    const float matched = target.match_sum == nullptr ? 0.0f : target.match_sum[at];
    float t = (share - 1.0f) * k;
    if (target.same_id_positive) t += share * matched;
    if (target.column_sum != nullptr) {
      t += floor *
           (target.column_sum[i] + (target.batch_keys == 0 ? k : 0.0f) - (target.same_id_positive ? 0.0f : matched));
    }
    return t;
  }
};

static __device__ __forceinline__ RowTarget row_target(const InfoNceTarget& target, int64_t row) {
  RowTarget x;
  if (target.plain || target.given != nullptr) return x;
  const long long matches = target.match_sum == nullptr ? 0 : target.matches[row];                   // NOLINT
  const long long queue_keys = target.queue_keys.value();                                            // NOLINT
  const long long classes = 1 + queue_keys + (target.batch_keys == 0 ? 0 : target.batch_keys - 1) -  // NOLINT
                            (target.same_id_positive ? 0 : matches);
  const long long positives = (target.own_key ? 1 : 0) + (target.same_id_positive ? matches : 0);  // NOLINT
  if (positives == 0) {
    x.share = 0.0f;
    x.no_positive = true;
  } else if (classes > 1 || !target.own_key) {  // a key without negatives has the whole target: no gradient, exactly
    x.share = (1.0f - target.label_smoothing) / static_cast<float>(positives);
    x.floor = target.label_smoothing / static_cast<float>(classes);
  }
  return x;
}

// reduced [1]: the sum or mean of loss [N], in a fixed order; grad_temperature likewise. The last block's threads call
// it.
static __device__ void reduce_rows(const InfoNceOutputs& outputs, const InfoNceWorkspace& workspace, int64_t n) {
  const bool has_temperature = outputs.grad_temperature != nullptr;
  float loss = 0.0f;
  float grad_temperature = 0.0f;
#pragma unroll 4  // loads in flight
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    loss += __ldcg(outputs.loss + i);  // not from this processor's L1
    if (has_temperature) grad_temperature += __ldcg(workspace.grad_temperature + i);
  }
  loss = block_join(loss, Add{});
  if (threadIdx.x == 0) *outputs.reduced = outputs.reduction == Reduction::kMean ? loss / static_cast<float>(n) : loss;
  if (!has_temperature) return;
  grad_temperature = block_join(grad_temperature, Add{});
  if (threadIdx.x == 0) *outputs.grad_temperature = grad_temperature;
}

template <typename Query>
__global__ void __launch_bounds__(32 * kCombineWarps)
    info_nce_combine_kernel(const Query* query, InfoNceAnchor<Query> anchor, RowOptions options,
                            InfoNceTemperature temperature, InfoNceTarget target, InfoNceWorkspace workspace,
                            InfoNceOutputs outputs, CombineShape shape) {
  constexpr int kHeld = kCombineColumns / 32;  // columns of a thread in a span, at most
  MOCO_DYNAMIC_SHARED(shared);                 // float4 [warps, 32]: the warps' sums of p n
  __shared__ float negatives_of_warp[kCombineWarps];
  __shared__ long long rank_of_warp[kCombineWarps];  // NOLINT: a type that shuffles accept
  __shared__ float dot_of_warp[kCombineWarps];
  __shared__ float excess_of_warp[kCombineWarps];
  __shared__ bool is_last;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row_warps = shape.row_warps();
  const int block_warp = static_cast<int>(threadIdx.x / 32);
  const int row_of_block = block_warp / row_warps;
  const int first_warp = row_of_block * row_warps;  // of the row
  const int warp = block_warp - first_warp;
  const int split_group = warp / shape.column_groups;
  const int column_group = warp - split_group * shape.column_groups;
  const int thread = warp * 32 + lane;  // of the row
  const int64_t n = options.n;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * shape.rows + row_of_block;
  const bool valid = block_row < n;  // others compute the last row, and write nothing
  const int64_t row = valid ? block_row : n - 1;
  const int c = static_cast<int>(options.c);
  const int64_t row_start = row * options.c;
  const int span = shape.span();

  // The thread's columns of a span: query and anchor, neither divided by its norm yet.
  float q[kHeld];
  float k[kHeld];
  float g[kHeld];                                 // sum of p n
  const auto column_of = [&](int first, int i) {  // or c
    const int at = thread + i * row_warps * 32;
    return at < span && first + at < c ? first + at : c;
  };
  const auto load_anchor = [&](int64_t at) {
    if (anchor.key != nullptr) return to_float(anchor.key[at]);
    return anchor.target != nullptr ? anchor.target[at] : 0.0f;
  };
  const auto load_columns = [&](int first) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = column_of(first, i);
      q[i] = column < c ? to_float(query[row_start + column]) : 0.0f;
      k[i] = column < c ? load_anchor(row_start + column) : 0.0f;
    }
  };
  load_columns(0);  // which no previous kernel writes
  const float inverse_temperature = 1.0f / temperature.value();
  wait_for_previous_kernel();

  // What a warp adds up: a range of splits, for 128 columns. The loads do not wait for the weights.
  const InfoNcePartials& partials = workspace.partials;
  const int splits = static_cast<int>(workspace.splits);
  const int64_t slot = partials.slot(row, 0);
  const int first_split = splits * split_group / shape.split_groups;
  const int end_split = splits * (split_group + 1) / shape.split_groups;
  const bool has_sums = outputs.grad_query != nullptr && splits > 0;
  const int pitch = static_cast<int>(partials.pitch);
  float4 x[kCombineSplits];
  const auto load_sums = [&](int first, int split) {  // beyond the last split it is loaded again, with the weight 0
    const int column = min(first + column_group * kCombineColumns + kHeld * lane, pitch - kHeld);
    const float* const from = partials.keys + slot * pitch + column;
#pragma unroll
    for (int u = 0; u < kCombineSplits; ++u) {
      x[u] = *reinterpret_cast<const float4*>(from + static_cast<int64_t>(min(split + u, end_split - 1)) * pitch);
    }
  };
  if (has_sums) load_sums(0, first_split);
  const float positive = workspace.positive[row];
  const float row_scale = workspace.row_scale[row];
  const float query_norm = workspace.query_norm[row];
  const float key_norm = workspace.key_norm[row];
  float max = -INFINITY;  // of the negatives' scores
#pragma unroll 4          // loads in flight
  for (int split = lane; split < splits; split += 32) max = fmaxf(max, partials.max[slot + split]);
  max = warp_join(max, Max{});
  const float shift = max == -INFINITY ? 0.0f : max;  // -inf - -inf would be NaN
  const float scale = row_scale * 1.44269504f * inverse_temperature;
  const float inverse_query = 1.0f / options.divisor(query_norm);
  const float inverse_key = 1.0f / options.divisor(key_norm);
  const float inverse_anchor = anchor.key != nullptr ? inverse_key : 1.0f;

  float4* const row_parts = reinterpret_cast<float4*>(shared) + first_warp * 32;
  float negatives = 0.0f;  // sum of p, relative to max
  long long rank = 0;      // NOLINT: a type that shuffles accept
  float dot = 0.0f;        // unit query . sum of p n
  const bool one_span = c <= span;
#pragma unroll 1
  for (int first = 0; first == 0 || (has_sums && first < c); first += span) {
    if (first > 0) {
      __syncthreads();  // the parts of the span before have been read
      load_columns(first);
      load_sums(first, first_split);
    }
    float4 total{};
#pragma unroll 1
    for (int base = first_split; base < end_split; base += 32) {
      float weight = 0.0f;  // of the lane's split
      if (const int split = base + lane; split < end_split) {
        weight = exp2f((partials.max[slot + split] - shift) * scale);
        if (first == 0 && column_group == 0) {
          negatives += weight * partials.sum[slot + split];
          rank += partials.rank[slot + split];
        }
      }
      const int count = has_sums ? min(end_split - base, 32) : 0;
#pragma unroll 1
      for (int i = 0; i < count; i += kCombineSplits) {
#pragma unroll
        for (int u = 0; u < kCombineSplits; ++u) {
          const float w = __shfl_sync(0xffffffffu, weight, i + u);
          total.x = fmaf(w, x[u].x, total.x);
          total.y = fmaf(w, x[u].y, total.y);
          total.z = fmaf(w, x[u].z, total.z);
          total.w = fmaf(w, x[u].w, total.w);
        }
        if (const int next = base + i + kCombineSplits; next < end_split) load_sums(first, next);
      }
    }
    if (first == 0) {
      negatives = warp_join(negatives, Add{});
      rank = warp_join(rank, Add{});
      if (lane == 0) negatives_of_warp[block_warp] = negatives, rank_of_warp[block_warp] = rank;
    }
    row_parts[thread] = total;
    __syncthreads();
    const float* const parts = reinterpret_cast<const float*>(row_parts);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = column_of(first, i);
      g[i] = 0.0f;
      if (!has_sums || column == c) continue;
#pragma unroll 4
      for (int s = 0; s < shape.split_groups; ++s) g[i] += parts[s * span + column - first];
      dot = fmaf(q[i] * inverse_query, g[i], dot);
      if (!one_span && valid) outputs.grad_query[row_start + column] = g[i];
    }
  }

  const RowTarget mean = row_target(target, row);
  float excess = 0.0f;  // of the anchor's score over the target's
  if (!target.plain) {
#pragma unroll 1
    for (int i = thread; i < c; i += row_warps * 32) {
      const float anchor_i = load_anchor(row_start + i) * inverse_anchor;
      excess -= to_float(query[row_start + i]) * inverse_query * mean.less_anchor(target, row_start + i, i, anchor_i);
    }
  }
  dot = warp_join(dot, Add{});
  excess = warp_join(excess, Add{});
  if (lane == 0) dot_of_warp[block_warp] = dot, excess_of_warp[block_warp] = excess;
  __syncthreads();
  negatives = dot = excess = 0.0f;
  rank = 0;
#pragma unroll 1
  for (int w = first_warp; w < first_warp + row_warps; ++w) {
    negatives += negatives_of_warp[w];
    rank += rank_of_warp[w];
    dot += dot_of_warp[w];
    excess += excess_of_warp[w];
  }

  const RowResults result =
      row_results((max * row_scale - positive) * inverse_temperature, negatives, target.candidate);
  const float rest = result.rest;
  // The own key's weight in the target less its probability.
  const float own_rest = !target.own_key           ? 0.0f
                         : target.given != nullptr ? -result.own
                         : target.plain            ? rest
                                                   : rest - (1.0f - (mean.share + mean.floor));
  const float row_weight = mean.no_positive                        ? 0.0f
                           : outputs.reduction == Reduction::kMean ? 1.0f / static_cast<float>(n)
                                                                   : 1.0f;
  const bool has_anchor = anchor.key != nullptr || anchor.target != nullptr;
  // q . d loss / d q
  const float query_dot = (result.key_weight * dot - rest * positive + excess) * inverse_temperature;
  if (thread == 0 && valid) {
    const float positive_logit = positive * inverse_temperature;
    const float row_loss = mean.no_positive ? 0.0f : result.loss + excess * inverse_temperature;
    outputs.loss[row] = row_loss;
    if (outputs.reduction == Reduction::kNone && outputs.reduced != nullptr) outputs.reduced[row] = row_loss;
    outputs.lse[row] = result.loss + positive_logit;
    outputs.positive_logit[row] = has_anchor ? positive_logit : -excess * inverse_temperature;
    outputs.rank[row] = has_anchor ? rank : -1;
    if (outputs.weights != nullptr) {
      outputs.weights[3 * row] = result.loss == -INFINITY ? 0.0f : mean.share;  // no candidate
      outputs.weights[3 * row + 1] = mean.floor;
      outputs.weights[3 * row + 2] = -own_rest;
    }
    if (outputs.grad_query != nullptr && outputs.grad_temperature != nullptr) {
      float* const rows = outputs.reduction == Reduction::kNone ? outputs.grad_temperature : workspace.grad_temperature;
      rows[row] = -query_dot * inverse_temperature * row_weight;
    }
  }

  // The last block to get here reduces the rows. The count is on its way while the gradients are written.
  const bool reduces = outputs.reduction != Reduction::kNone;
  unsigned blocks_before = 0;
  if (reduces) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      blocks_before = atomicAdd(workspace.finished, 1u);
    }
  }

  // The gradients, propagated through the norms. A clamped norm is a constant.
  const bool of_query_norm = options.normalize && query_norm > options.eps;
  const bool of_key_norm = options.normalize && key_norm > options.eps;
  const float key_dot = -own_rest * positive * inverse_temperature;
#pragma unroll 1
  for (int first = 0; valid && first < c; first += span) {
    if (outputs.grad_query == nullptr && outputs.grad_key == nullptr) break;
    if (!one_span) load_columns(first);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = column_of(first, i);
      if (column == c) continue;
      const int64_t at = row_start + column;
      const float unit_query = q[i] * inverse_query;
      const float unit_anchor = k[i] * inverse_anchor;
      if (outputs.grad_query != nullptr) {
        float of_query =
            result.key_weight * (one_span || !has_sums ? g[i] : outputs.grad_query[at]) - rest * unit_anchor;
        if (!target.plain) of_query -= mean.less_anchor(target, at, column, unit_anchor);
        of_query *= inverse_temperature;
        if (of_query_norm) of_query -= query_dot * unit_query;
        outputs.grad_query[at] = of_query * (inverse_query * row_weight);
      }
      if (outputs.grad_key != nullptr) {
        float of_key = -own_rest * unit_query * inverse_temperature;
        if (of_key_norm) of_key -= key_dot * unit_anchor;
        outputs.grad_key[at] = of_key * (inverse_key * row_weight);
      }
    }
  }
  if (!reduces) return;
  if (threadIdx.x == 0) {
    is_last = blocks_before == gridDim.x - 1;
    if (is_last) __threadfence();
  }
  __syncthreads();
  if (is_last) reduce_rows(outputs, workspace, n);
}

}  // namespace moco_ext::cuda
