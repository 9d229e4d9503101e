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
  float* key_norm = nullptr;     // [N] of the rows' keys, 1 if they have none; all that follows is for queries
  float* positive = nullptr;     // [padded] x . anchor
  float* row_scale = nullptr;    // [padded]
  unsigned* finished = nullptr;  // [1] set to 0
};

// x and, where the operand is that of queries, their anchors. A warp per row.
template <typename T, typename Operand>
__global__ void info_nce_prepare_kernel(const T* x, InfoNceAnchor<T> anchor, RowOptions options, int64_t padded,
                                        InfoNceOperand<Operand> operand) {
  let_next_kernel_start();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= padded) return;
  const bool is_query = operand.positive != nullptr;
  if (row == 0 && lane == 0 && is_query) *operand.finished = 0;
  Operand* const to = operand.rows + row * options.c;
  if (row >= options.n) {  // padding: computed with the rest of its block, but not written to the outputs
    for (int64_t i = lane; i < options.c; i += 32) to[i] = from_float<Operand>(0.0f);
    if (lane == 0 && is_query) {
      operand.positive[row] = 0.0f;
      operand.row_scale[row] = 1.0f;
    }
    return;
  }
  x += row * options.c;
  const bool has_key = anchor.key != nullptr;
  const T* const key = has_key ? anchor.key + row * options.c : nullptr;
  const float* const target = has_key || anchor.target == nullptr ? nullptr : anchor.target + row * options.c;
  float square = 0.0f;
  float key_square = 0.0f;
  float largest = 0.0f;
#pragma unroll 4  // loads in flight
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
  if (is_query && !std::is_same_v<Operand, float> && largest > 0.0f && largest < INFINITY) {
    frexpf(largest, &exponent);
    exponent = min(max(exponent, -100), 100);
  }
  float positive = 0.0f;
  for (int64_t i = lane; i < options.c; i += 32) {
    const float value = to_float(x[i]) / divisor;
    to[i] = from_float<Operand>(ldexpf(value, -exponent));
    if (has_key) positive += value * (to_float(key[i]) / key_divisor);
    if (target != nullptr) positive += value * target[i];
  }
  if (lane == 0 && operand.norm != nullptr) operand.norm[row] = norm;
  if (!is_query) return;
  positive = warp_join(positive, Add{});
  if (lane == 0) {
    operand.key_norm[row] = key_norm;
    operand.positive[row] = positive;
    operand.row_scale[row] = ldexpf(1.0f, exponent);
  }
}

constexpr int kCombineColumns = 128;
constexpr int kCombineSplits = 8;  // of a warp, if there are enough warps
constexpr int kCombineMinWarps = 4;
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
#pragma unroll 8                                                                      // loads in flight
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) total += __ldcg(rows + i);  // not from this processor's L1
    return block_join(total, Add{});
  };
  const float loss = sum(outputs.loss);
  if (threadIdx.x == 0) *outputs.reduced = outputs.reduction == Reduction::kMean ? loss / static_cast<float>(n) : loss;
  if (outputs.grad_temperature == nullptr) return;
  const float grad_temperature = sum(workspace.grad_temperature);
  if (threadIdx.x == 0) *outputs.grad_temperature = grad_temperature;
}

struct RowSums {
  float positive;   // q . anchor
  float row_scale;  // of the query operand
  float query_norm;
  float key_norm;
  float max = -INFINITY;   // of the negatives' scores
  float negatives = 0.0f;  // sum of p, relative to max
  long long rank = 0;      // NOLINT: a type that shuffles accept
  float dot = 0.0f;        // query . sum of p n
};

// The row's results, and its gradients, propagated through the norms. One warp. grad_query holds the sum of p n,
// written by the lanes that read it here.
template <typename Query>
static __device__ void finish_row(int64_t row, const Query* query, const InfoNceAnchor<Query>& anchor,
                                  const RowOptions& options, float inverse_temperature, const InfoNceTarget& target,
                                  const InfoNceWorkspace& workspace, const InfoNceOutputs& outputs,
                                  const RowSums& sums) {
  // Everything is relative to the anchor's logit or the negatives' largest, whichever is larger, so that nothing
  // cancels in a loss near 0 or in 1 - p0. NaN takes the second branch, which propagates it.
  const int64_t n = options.n;
  const int64_t c = options.c;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto [positive, row_scale, query_norm, key_norm, max, negatives, rank, dot] = sums;
  const float gap = (max * row_scale - positive) * inverse_temperature;
  float loss;
  float key_weight;  // of the sum of p n
  float own;         // p0, the probability of the row's own key, or 0
  float rest;        // 1 - p0
  if (gap <= 0.0f && target.candidate) {
    const float factor = expf(gap);
    loss = log1pf(negatives * factor);
    own = 1.0f / (1.0f + negatives * factor);
    key_weight = factor / (1.0f + negatives * factor);
    rest = negatives * key_weight;
  } else {
    own = target.candidate ? expf(-gap) : 0.0f;
    const float total = negatives + own;
    loss = gap + logf(total);
    key_weight = total == 0.0f ? 0.0f : 1.0f / total;  // without a candidate the loss is -inf, its gradient 0
    own *= key_weight;
    rest = total == 0.0f ? 1.0f : negatives / total;
  }
  const float inverse_query = 1.0f / options.divisor(query_norm);
  const float inverse_key = 1.0f / options.divisor(key_norm);
  float row_weight = outputs.reduction == Reduction::kMean ? 1.0f / static_cast<float>(n) : 1.0f;
  query += row * c;
  const bool has_anchor = anchor.key != nullptr || anchor.target != nullptr;
  const auto of_anchor = [&](int64_t i) {
    if (anchor.key != nullptr) return to_float(anchor.key[row * c + i]) * inverse_key;
    return has_anchor ? anchor.target[row * c + i] : 0.0f;
  };

  // A target other than the anchor: only the difference is added.
  float share = 1.0f;   // of each positive
  float floor = 0.0f;   // of each class
  float excess = 0.0f;  // of the anchor's score over the target's
  // The own key's weight in the target less its probability.
  float own_rest = target.given != nullptr ? -own : target.own_key ? rest : 0.0f;
  if (!target.plain && target.given == nullptr) {
    const long long matches = target.match_sum == nullptr ? 0 : target.matches[row];                   // NOLINT
    const long long queue_keys = target.queue_keys.value();                                            // NOLINT
    const long long classes = 1 + queue_keys + (target.batch_keys == 0 ? 0 : target.batch_keys - 1) -  // NOLINT
                              (target.same_id_positive ? 0 : matches);
    const long long positives = (target.own_key ? 1 : 0) + (target.same_id_positive ? matches : 0);  // NOLINT
    if (positives == 0) {
      share = row_weight = 0.0f;
    } else if (classes > 1 || !target.own_key) {  // a key without negatives has the whole target: no gradient, exactly
      share = (1.0f - target.label_smoothing) / static_cast<float>(positives);
      floor = target.label_smoothing / static_cast<float>(classes);
    }
    own_rest = target.own_key ? rest - (1.0f - (share + floor)) : 0.0f;
  }
  const auto target_less_anchor = [&](int64_t i, float k) {  // element i, k being the anchor's
    if (target.given != nullptr) return target.given[row * c + i] - k;
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
    for (int64_t i = lane; i < c; i += 32) {
      excess -= to_float(query[i]) * inverse_query * target_less_anchor(i, of_anchor(i));
    }
    excess = warp_join(excess, Add{});
  }
  if (lane == 0) {
    const float positive_logit = positive * inverse_temperature;
    const float row_loss = share == 0.0f ? 0.0f : loss + excess * inverse_temperature;  // without a positive 0
    outputs.loss[row] = row_loss;
    if (outputs.reduction == Reduction::kNone && outputs.reduced != nullptr) outputs.reduced[row] = row_loss;
    outputs.lse[row] = loss + positive_logit;
    outputs.positive_logit[row] = has_anchor ? positive_logit : -excess * inverse_temperature;
    outputs.rank[row] = has_anchor ? rank : -1;
    if (outputs.weights != nullptr) {
      outputs.weights[3 * row] = loss == -INFINITY ? 0.0f : share;  // no candidate
      outputs.weights[3 * row + 1] = floor;
      outputs.weights[3 * row + 2] = -own_rest;
    }
  }

  if (outputs.grad_query != nullptr) {
    float* const gradient = outputs.grad_query + row * c;
    // q . d loss / d q
    const float unit_dot = (key_weight * dot - rest * positive + excess) * inverse_temperature;
    for (int64_t i = lane; i < c; i += 32) {
      const float q = to_float(query[i]) * inverse_query;
      const float k = of_anchor(i);
      float g = key_weight * gradient[i] - rest * k;
      if (!target.plain) g -= target_less_anchor(i, k);
      g *= inverse_temperature;
      if (options.normalize && query_norm > options.eps) g -= unit_dot * q;  // a clamped norm is a constant
      gradient[i] = g * (inverse_query * row_weight);
    }
    if (lane == 0 && outputs.grad_temperature != nullptr) {
      float* const rows = outputs.reduction == Reduction::kNone ? outputs.grad_temperature : workspace.grad_temperature;
      rows[row] = -unit_dot * inverse_temperature * row_weight;
    }
  }
  if (outputs.grad_key != nullptr) {
    const float unit_dot = -own_rest * positive * inverse_temperature;
    for (int64_t i = lane; i < c; i += 32) {
      const float q = to_float(query[i]) * inverse_query;
      const float k = of_anchor(i);
      float g = -own_rest * q * inverse_temperature;
      if (options.normalize && key_norm > options.eps) g -= unit_dot * k;
      outputs.grad_key[row * c + i] = g * (inverse_key * row_weight);
    }
  }
}

// A block per row: adds up the splits in a fixed order, then its first warp finishes the row.
template <typename Query>
__global__ void __launch_bounds__(32 * kCombineMaxWarps)
    info_nce_combine_kernel(const Query* query, InfoNceAnchor<Query> anchor, RowOptions options,
                            InfoNceTemperature temperature, InfoNceTarget target, InfoNceWorkspace workspace,
                            InfoNceOutputs outputs) {
  wait_for_previous_kernel();
  constexpr int kColumns = kCombineColumns / 32;  // of a lane
  constexpr int kInFlight = kCombineSplits;       // splits that a lane loads at once
  static_assert(kColumns == 4);
  __shared__ float negatives_of_warp[kCombineMaxWarps];
  __shared__ long long rank_of_warp[kCombineMaxWarps];  // NOLINT: a type that shuffles accept
  __shared__ float4 parts[2][kCombineMaxWarps][32];
  const int64_t row = blockIdx.x;
  const int64_t c = options.c;
  const int splits = static_cast<int>(workspace.splits);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const InfoNcePartials& partials = workspace.partials;
  const int64_t slot = partials.slot(row, 0);
  RowSums sums{workspace.positive[row], workspace.row_scale[row], workspace.query_norm[row], workspace.key_norm[row]};
#pragma unroll 4  // loads in flight
  for (int split = lane; split < splits; split += 32) sums.max = fmaxf(sums.max, partials.max[slot + split]);
  sums.max = warp_join(sums.max, Max{});
  const float shift = sums.max == -INFINITY ? 0.0f : sums.max;  // -inf - -inf would be NaN
  const float inverse_temperature = 1.0f / temperature.value();
  const float scale = sums.row_scale * 1.44269504f * inverse_temperature;
  const float inverse_query = 1.0f / options.divisor(sums.query_norm);

  // Each warp adds up a range of splits, for some columns at a time; then the first warp adds up the warps.
  const int first_split = splits * warp / warps;
  const int end_split = splits * (warp + 1) / warps;
  const int64_t columns = outputs.grad_query == nullptr ? 0 : c;
  int buffer = 0;
#pragma unroll 1
  for (int64_t first = 0; first == 0 || first < columns; first += kCombineColumns, buffer ^= 1) {
    float4 total{};
#pragma unroll 1
    for (int base = first_split; base < end_split; base += 32) {
      float weight = 0.0f;  // of the lane's split
      if (const int split = base + lane; split < end_split) {
        weight = exp2f((partials.max[slot + split] - shift) * scale);
        if (first == 0) {
          sums.negatives += weight * partials.sum[slot + split];
          sums.rank += partials.rank[slot + split];
        }
      }
      // No branches: what is loaded beyond the last split gets the weight 0, and beyond the last column is not used.
      const int count = columns == 0 ? 0 : min(end_split - base, 32);
      const float* const from = partials.keys + (slot + base) * c;
#pragma unroll 1
      for (int i = 0; i < count; i += kInFlight) {
        float4 x[kInFlight];
        const auto load = [&](auto elements) {
#pragma unroll
          for (int u = 0; u < kInFlight; ++u) x[u] = elements(from + min(i + u, count - 1) * static_cast<int>(c));
        };
        const int64_t column = first + kColumns * lane;
        if (c % 4 == 0) {
          load([&](const float* keys) { return *reinterpret_cast<const float4*>(keys + min(column, c - 4)); });
        } else {
          const auto at = [&](int j) { return min(column + j, c - 1); };
          load([&](const float* keys) { return float4{keys[at(0)], keys[at(1)], keys[at(2)], keys[at(3)]}; });
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          const float w = __shfl_sync(0xffffffffu, weight, i + u);
          total.x = fmaf(w, x[u].x, total.x);
          total.y = fmaf(w, x[u].y, total.y);
          total.z = fmaf(w, x[u].z, total.z);
          total.w = fmaf(w, x[u].w, total.w);
        }
      }
    }
    if (first == 0) {
      sums.negatives = warp_join(sums.negatives, Add{});
      sums.rank = warp_join(sums.rank, Add{});
      if (lane == 0) negatives_of_warp[warp] = sums.negatives, rank_of_warp[warp] = sums.rank;
    }
    parts[buffer][warp][lane] = total;  // the first warp may still read the other buffer
    __syncthreads();
    if (warp != 0) continue;
    // In finish_row, lane i has the columns i, i + 32, ...
    for (int64_t column = lane; column < min(columns - first, int64_t{kCombineColumns}); column += 32) {
      float gradient = 0.0f;
      for (int w = 0; w < warps; ++w) gradient += reinterpret_cast<const float*>(parts[buffer][w])[column];
      const int64_t at = row * c + first + column;
      outputs.grad_query[at] = gradient;
      sums.dot = fmaf(to_float(query[at]) * inverse_query, gradient, sums.dot);
    }
  }
  if (warp == 0) {
    sums.dot = warp_join(sums.dot, Add{});
    for (int w = 1; w < warps; ++w) sums.negatives += negatives_of_warp[w], sums.rank += rank_of_warp[w];
    finish_row(row, query, anchor, options, inverse_temperature, target, workspace, outputs, sums);
  }
  if (outputs.reduction != Reduction::kNone) reduce_rows(outputs, workspace, options.n);
}

}  // namespace moco_ext::cuda
