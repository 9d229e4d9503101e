// The InfoNCE kernel after the passes, `combine`: adds up the splits of each row, and finishes loss and gradients.
//
// It waits for memory and for its own instructions rather than for arithmetic, so everything that it reads is in flight
// at once, and all threads that finish a row compute its few scalars themselves.
#pragma once

#include "kernels/cuda/info_nce_rows.cuh"

namespace moco_ext::cuda {

constexpr int kCombineColumns = 128;  // of a warp: four of each lane
constexpr int kCombineSplits = 8;     // that a warp loads at once
constexpr int kCombineWarps = 16;     // of a block, at most

// Two blocks of nine warps, of 66 splits, fit a multiprocessor with 96 registers a thread, to which a bound of more
// than 16 warps limits them. Before Hopper they would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kCombineBound = 32 * kCombineWarps;
#else
constexpr int kCombineBound = 32 * kCombineWarps + 32;
#endif

// Of the blocks: threadIdx.x has four columns of a span, threadIdx.y some of the splits, threadIdx.z a row.
struct CombineShape {
  int column_warps;
  int split_groups;
  int group_splits;  // of each group but the last
  int rows;          // of a block
  __host__ __device__ int span() const { return column_warps * kCombineColumns; }
  dim3 threads() const {
    return dim3(static_cast<unsigned>(column_warps * 32), static_cast<unsigned>(split_groups),
                static_cast<unsigned>(rows));
  }
  int warps() const { return column_warps * split_groups * rows; }
};

// columns: 0 without gradient.
inline CombineShape combine_shape(int64_t n, int64_t columns, int64_t splits) {
  const auto clamp = [](int64_t x, int64_t most) { return static_cast<int>(x > most ? most : x < 1 ? 1 : x); };
  CombineShape shape{};
  shape.column_warps = clamp((columns + kCombineColumns - 1) / kCombineColumns, 8);
  const int most_groups = columns == 0 ? 1 : kCombineWarps / shape.column_warps;
  const int groups = clamp((splits + kCombineSplits - 1) / kCombineSplits, most_groups);
  shape.group_splits = clamp((splits + groups - 1) / groups, INT_MAX);
  shape.split_groups = clamp((splits + shape.group_splits - 1) / shape.group_splits, most_groups);
  const int row_warps = shape.column_warps * shape.split_groups;
  shape.rows = clamp(n / 256, clamp(8 / row_warps, 8));  // with few rows, more blocks than multiprocessors
  return shape;
}

// Weights and results of a row that all threads that finish it know.
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
  for (int64_t i = block_thread(); i < n; i += block_threads()) {
    loss += __ldcg(outputs.loss + i);  // not from this processor's L1
    if (has_temperature) grad_temperature += __ldcg(workspace.grad_temperature + i);
  }
  loss = block_join(loss, Add{});
  if (block_thread() == 0)
    *outputs.reduced = outputs.reduction == Reduction::kMean ? loss / static_cast<float>(n) : loss;
  if (!has_temperature) return;
  grad_temperature = block_join(grad_temperature, Add{});
  if (block_thread() == 0) *outputs.grad_temperature = grad_temperature;
}

template <typename Query>
__global__ void __launch_bounds__(kCombineBound)
    info_nce_combine_kernel(const Query* query, InfoNceAnchor<Query> anchor, RowOptions options,
                            InfoNceTemperature temperature, InfoNceTarget target, InfoNceWorkspace workspace,
                            InfoNceOutputs outputs, CombineShape shape) {
  constexpr int kHeld = kCombineColumns / 32;    // columns of a thread in a span
  MOCO_DYNAMIC_SHARED(shared);                   // float4 [rows, split_groups, span / 4]: sums of p n
  __shared__ float negatives_of[kCombineWarps];  // [rows, split_groups]
  __shared__ uint32_t rank_of[kCombineWarps];
  __shared__ float dot_of[kCombineWarps];  // [rows, column_warps]
  __shared__ float excess_of[kCombineWarps];
  __shared__ bool is_last;
  if (block_thread() == 0) is_last = false;  // until a barrier from now on
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int group = static_cast<int>(threadIdx.y);
  const int groups = shape.split_groups;
  const int row_of_block = static_cast<int>(threadIdx.z);
  const int row_threads = shape.column_warps * 32;  // of a group
  const int thread = static_cast<int>(threadIdx.x);
  const bool is_first = threadIdx.x == 0 && threadIdx.y == 0;
  const bool finishes = group == 0;  // the row
  const int64_t n = options.n;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * shape.rows + row_of_block;
  const bool valid = block_row < n;  // others compute the last row, and write nothing
  const int64_t row = valid ? block_row : n - 1;
  const int c = static_cast<int>(options.c);
  const int64_t row_start = row * options.c;
  const int span = shape.span();

  // The thread's columns of a span, from `column` on: query and anchor, neither divided by its norm yet.
  float q[kHeld];
  float k[kHeld];
  const auto load_anchor = [&](int64_t at) {
    if (anchor.key != nullptr) return to_float(anchor.key[at]);
    return anchor.target != nullptr ? anchor.target[at] : 0.0f;
  };
  const auto load_columns = [&](int column) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      q[i] = column + i < c ? to_float(query[row_start + column + i]) : 0.0f;
      k[i] = column + i < c ? load_anchor(row_start + column + i) : 0.0f;
    }
  };
  if (finishes) load_columns(kHeld * thread);  // which no previous kernel writes
  const float inverse_temperature = 1.0f / temperature.value();
  wait_for_previous_kernel();

  // What a group adds up: some splits, for the columns of a span. The loads do not wait for the weights.
  const InfoNcePartials& partials = workspace.partials;
  const int splits = static_cast<int>(workspace.splits);
  const int64_t slot = partials.slot(row, 0);
  const int first_split = group * shape.group_splits;
  const int end_split = min(first_split + shape.group_splits, splits);
  const bool has_sums = outputs.grad_query != nullptr && splits > 0;
  const int64_t pitch = partials.pitch;
  float4 x[kCombineSplits];
  const auto load_sums = [&](int first, int split) {  // beyond the last split it is loaded again, with the weight 0
    const float* const from =
        partials.keys + slot * pitch + min(first + kHeld * thread, static_cast<int>(pitch) - kHeld);
#pragma unroll
    for (int u = 0; u < kCombineSplits; ++u) {
      x[u] = *reinterpret_cast<const float4*>(from + min(split + u, end_split - 1) * pitch);
    }
  };
  if (has_sums) load_sums(0, first_split);
  const float positive = workspace.positive[row];
  const float row_scale = workspace.row_scale[row];
  const float query_norm = workspace.query_norm[row];
  const float key_norm = workspace.key_norm[row];
  // Of the lane's split.
  const auto load_split = [&](int base, float& split_max, float& split_sum, uint32_t& split_rank) {
    const int split = base + lane;
    const bool is_split = split < end_split;
    split_max = is_split ? partials.max[slot + split] : -INFINITY;
    split_sum = is_split ? partials.sum[slot + split] : 0.0f;
    split_rank = is_split ? partials.rank[slot + split] : 0;
  };
  float split_max;
  float split_sum;
  uint32_t split_rank;
  load_split(first_split, split_max, split_sum, split_rank);
  float max = -INFINITY;  // of the negatives' scores
#pragma unroll 1
  for (int base = lane; base < splits; base += 4 * 32) {
    float these[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) these[i] = base + 32 * i < splits ? partials.max[slot + base + 32 * i] : -INFINITY;
    max = fmaxf(max, fmaxf(fmaxf(these[0], these[1]), fmaxf(these[2], these[3])));
  }
  max = warp_join(max, Max{});
  const float shift = max == -INFINITY ? 0.0f : max;  // -inf - -inf would be NaN
  const float scale = row_scale * 1.44269504f * inverse_temperature;
  const float inverse_query = 1.0f / options.divisor(query_norm);
  const float inverse_key = 1.0f / options.divisor(key_norm);
  const float inverse_anchor = anchor.key != nullptr ? inverse_key : 1.0f;

  float4* const parts = reinterpret_cast<float4*>(shared) + row_of_block * groups * row_threads;
  float negatives = 0.0f;  // sum of p, relative to max
  uint32_t rank = 0;
  float dot = 0.0f;     // unit query . sum of p n
  float g[kHeld] = {};  // sum of p n
  const bool one_span = c <= span;
#pragma unroll 1
  for (int first = 0; first == 0 || (has_sums && first < c); first += span) {
    const int column = first + kHeld * thread;
    if (first > 0) {
      __syncthreads();  // the parts of the span before have been read
      if (finishes) load_columns(column);
      load_sums(first, first_split);
      load_split(first_split, split_max, split_sum, split_rank);
    }
    float4 total{};
#pragma unroll 1
    for (int base = first_split; base < end_split; base += 32) {
      if (base > first_split) load_split(base, split_max, split_sum, split_rank);
      const float weight = exp2f((split_max - shift) * scale);
      if (first == 0) {
        negatives += weight * split_sum;
        rank += split_rank;
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
      if (threadIdx.x == 0) {
        negatives_of[row_of_block * groups + group] = negatives;
        rank_of[row_of_block * groups + group] = rank;
      }
    }
    parts[group * row_threads + thread] = total;
    __syncthreads();
    if (!finishes || !has_sums) continue;
    total = parts[thread];
#pragma unroll 4
    for (int i = 1; i < groups; ++i) {
      const float4 part = parts[i * row_threads + thread];
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    g[0] = total.x, g[1] = total.y, g[2] = total.z, g[3] = total.w;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (column + i >= c) continue;  // there the padding was added up
      dot = fmaf(q[i] * inverse_query, g[i], dot);
      if (!one_span && valid) outputs.grad_query[row_start + column + i] = g[i];
    }
  }

  const RowTarget mean = row_target(target, row);
  float excess = 0.0f;  // of the anchor's score over the target's
  if (finishes && !target.plain) {
#pragma unroll 1
    for (int i = thread; i < c; i += row_threads) {
      const float anchor_i = load_anchor(row_start + i) * inverse_anchor;
      excess -= to_float(query[row_start + i]) * inverse_query * mean.less_anchor(target, row_start + i, i, anchor_i);
    }
  }
  if (finishes) {
    dot = warp_join(dot, Add{});
    excess = warp_join(excess, Add{});
  }
  if (shape.column_warps > 1) {
    float* const dots = dot_of + row_of_block * shape.column_warps;
    float* const excesses = excess_of + row_of_block * shape.column_warps;
    if (finishes && lane == 0) dots[thread / 32] = dot, excesses[thread / 32] = excess;
    __syncthreads();
    dot = excess = 0.0f;
#pragma unroll 1
    for (int i = 0; i < shape.column_warps; ++i) dot += dots[i], excess += excesses[i];
  }
  negatives = 0.0f;
  int64_t total_rank = 0;
#pragma unroll 1
  for (int i = row_of_block * groups; i < (row_of_block + 1) * groups; ++i)
    negatives += negatives_of[i], total_rank += rank_of[i];

  const bool reduces = outputs.reduction != Reduction::kNone;
  unsigned rows_before = 0;
  if (finishes) {
    const RowResults result =
        row_results((max * row_scale - positive) * inverse_temperature, negatives, target.candidate);
    const float rest = result.rest;
    // The own key's weight in the target less its probability.
    const float own_rest = !target.own_key           ? 0.0f
                           : target.given != nullptr ? -result.own
                           : target.plain            ? rest
                                                     : rest - (1.0f - (mean.share + mean.floor));
    const float row_weight = outputs.reduction == Reduction::kMean ? 1.0f / static_cast<float>(n) : 1.0f;
    // q . d loss / d q
    const float query_dot = (result.key_weight * dot - rest * positive + excess) * inverse_temperature;
    if (is_first && valid) {
      const bool has_anchor = anchor.key != nullptr || anchor.target != nullptr;
      const float positive_logit = positive * inverse_temperature;
      const float row_loss = mean.no_positive ? 0.0f : result.loss + excess * inverse_temperature;
      outputs.loss[row] = row_loss;
      if (!reduces && outputs.reduced != nullptr) outputs.reduced[row] = row_loss;
      outputs.lse[row] = result.loss + positive_logit;
      outputs.positive_logit[row] = has_anchor ? positive_logit : -excess * inverse_temperature;
      outputs.rank[row] = has_anchor ? total_rank : -1;
      if (outputs.weights != nullptr) {
        outputs.weights[3 * row] = result.loss == -INFINITY ? 0.0f : mean.share;  // no candidate
        outputs.weights[3 * row + 1] = mean.floor;
        outputs.weights[3 * row + 2] = -own_rest;
      }
      if (outputs.grad_query != nullptr && outputs.grad_temperature != nullptr) {
        float* const rows = reduces ? workspace.grad_temperature : outputs.grad_temperature;
        rows[row] = mean.no_positive ? 0.0f : -query_dot * inverse_temperature * row_weight;
      }
    }

    // The block of the last row to get here reduces the rows. The count is on its way while gradients are written.
    if (reduces && is_first) {
      __threadfence();
      if (valid) rows_before = atomicAdd(workspace.finished, 1u);
    }

    // The gradients, propagated through the norms. A clamped norm is a constant.
    const bool of_query_norm = options.normalize && query_norm > options.eps;
    const bool of_key_norm = options.normalize && key_norm > options.eps;
    const float key_dot = -own_rest * positive * inverse_temperature;
    const bool has_gradient = outputs.grad_query != nullptr || outputs.grad_key != nullptr;
#pragma unroll 1
    for (int first = 0; has_gradient && valid && first < c; first += span) {
      const int column = first + kHeld * thread;
      if (!one_span) load_columns(column);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (column + i >= c) continue;
        const int64_t at = row_start + column + i;
        const float unit_query = q[i] * inverse_query;
        const float unit_anchor = k[i] * inverse_anchor;
        if (outputs.grad_query != nullptr) {
          const float sum = one_span || !has_sums ? g[i] : outputs.grad_query[at];
          float of_query = result.key_weight * sum - rest * unit_anchor;
          if (!target.plain) of_query -= mean.less_anchor(target, at, column + i, unit_anchor);
          of_query *= inverse_temperature;
          if (of_query_norm) of_query -= query_dot * unit_query;
          of_query *= inverse_query * row_weight;
          outputs.grad_query[at] = mean.no_positive ? 0.0f : of_query;  // a weight of 0 would not keep NaN out
        }
        if (outputs.grad_key != nullptr) {
          float of_key = -own_rest * unit_query * inverse_temperature;
          if (of_key_norm) of_key -= key_dot * unit_anchor;
          outputs.grad_key[at] = of_key * (inverse_key * row_weight);
        }
      }
    }
  }
  if (!reduces) return;
  if (is_first && valid && rows_before == n - 1) is_last = true;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  reduce_rows(outputs, workspace, n);
}

}  // namespace moco_ext::cuda
