// Intermediate results of the InfoNCE kernels, and their layout in the workspace.
//
// A pass over the queue, divided into splits (info_nce_sm90.cuh, info_nce_mma.cuh or info_nce_generic.cuh) -> combine.
//
// In-batch keys are a second pass with more splits. A target distribution other than the positive alone is computed
// separately (info_nce_target.cuh), and combine uses it instead of the positive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda.h"
#include "kernels/cuda/cuda_launch.cuh"

namespace moco_ext::cuda {

struct InfoNceTemperature {
  float constant;
  const float* pointer;  // or null
  __device__ float value() const { return pointer == nullptr ? constant : *pointer; }
};

// Queries and their keys as the caller has them.
struct InfoNceQueries {
  const void* query;  // [N, C]
  const void* key;    // [N, C] the positive of each query, or null: there are none
  Dtype dtype;        // of both
  int64_t n;
  int64_t c;
  float eps;  // floor of a row's norm
  bool normalize;
  __device__ float divisor(float norm) const { return !normalize ? 1.0f : norm < eps ? eps : norm; }
};

template <typename Query>
InfoNceQueries info_nce_queries(const Query* query, const Query* key, int64_t n, int64_t c,
                                const InfoNceOptions& options) {
  constexpr Dtype kDtype = std::is_same_v<Query, float>           ? Dtype::kFloat32
                           : std::is_same_v<Query, __nv_bfloat16> ? Dtype::kBFloat16
                                                                  : Dtype::kFloat16;
  return {query, key, kDtype, n, c, options.eps, options.normalize};
}

// One row's partial results over one split, with p = exp((x - max) * scale / temperature) for a product x of the
// query's operand and a key (QueryFacts in info_nce_query.cuh).
struct InfoNcePartials {
  float* max;          // [splits, N] of x
  float* sum;          // [splits, N] of p
  uint32_t* rank;      // [splits, N] scores above the positive's
  float* keys;         // [splits, N, C] sum of p n; null without gradient
  unsigned* finished;  // [1] blocks of combine; each pass sets it to 0
};

constexpr int64_t kNoPositive = INT64_MIN;

// Keys of a pass that are not negatives of a row.
struct InfoNceMask {
  const int64_t* row_ids;  // [N], where key_ids are given
  const int64_t* key_ids;  // [K] or null
  int64_t key_offset;      // key key_offset + row is the positive of row; kNoPositive: there is none
  bool same_id_positive;

  __host__ __device__ bool any() const { return key_ids != nullptr || key_offset != kNoPositive; }
  __device__ bool is_positive(int64_t row, int64_t key) const {
    return key_offset != kNoPositive && key == key_offset + row;
  }
  __device__ bool same_id(int64_t row, int64_t key) const {
    return key_ids != nullptr && row_ids[row] >= 0 && row_ids[row] == key_ids[key];
  }
};

// The number of valid keys, known on the host or only on the device.
struct InfoNceKeyCount {
  int64_t most;
  const int64_t* num_valid;  // [1] or null
  __device__ int64_t value() const {
    if (num_valid == nullptr) return most;
    return *num_valid < 0 ? 0 : *num_valid < most ? *num_valid : most;
  }
};

// A pass over keys; computes the gradient if partials.keys is set.
template <typename Key>
struct InfoNcePassArguments {
  InfoNceQueries queries;
  const Key* keys;  // [K, C]
  InfoNceKeyCount count;
  InfoNceMask mask;
  InfoNceTemperature temperature;
  InfoNcePartials partials;
  int splits;
};

// A target distribution, for combine.
struct InfoNceTarget {
  bool plain;               // only the positive
  const float* column_sum;  // [C] over all keys, or null without label smoothing
  const float* match_sum;   // [N, C] over the keys with the row's id, or null
  const int64_t* matches;   // [N], with match_sum
  InfoNceKeyCount queue_keys;
  int64_t batch_keys;  // 0, or M with in_batch
  float label_smoothing;
  bool same_id_positive;
};

struct InfoNceWorkspace {
  float* grad_temperature;  // [N], to be reduced
  void* keys;               // [M, C] with in_batch: the keys as the pass reads them, normalized
  float* column_parts;      // [kColumnParts, C] with label smoothing
  float* column_sum;        // [C]
  float* match_sum;         // [N, C] with ids, if the target or label smoothing needs them
  int64_t* matches;         // [N]
  InfoNcePartials partials;
  int64_t splits;        // of queue and batch
  int64_t queue_splits;  // come first
  size_t bytes;
};
constexpr int kColumnParts = 128;

inline bool needs_matches(const InfoNceContrast& contrast) {
  return contrast.key_ids != nullptr && (contrast.same_id_positive || contrast.label_smoothing > 0);
}

// Divides memory into pieces. A null base gives the size.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  void take(T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
  }
  void take(void*& operand, int64_t count) {  // of up to four bytes each
    float* piece = nullptr;
    take(piece, count);
    operand = piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// A null base gives the size.
inline InfoNceWorkspace info_nce_workspace(void* base, const InfoNceShape& shape, const InfoNceContrast& contrast,
                                           int64_t queue_splits, int64_t batch_splits, bool gradient) {
  InfoNceWorkspace w{};
  Pieces pieces(base);
  w.queue_splits = queue_splits;
  w.splits = queue_splits + batch_splits;
  const int64_t slots = w.splits * shape.n;
  pieces.take(w.grad_temperature, shape.n);
  if (contrast.in_batch) pieces.take(w.keys, contrast.keys * shape.c);
  if (contrast.label_smoothing > 0) {
    pieces.take(w.column_parts, kColumnParts * shape.c);
    pieces.take(w.column_sum, shape.c);
  }
  if (needs_matches(contrast)) {
    pieces.take(w.match_sum, shape.n * shape.c);
    pieces.take(w.matches, shape.n);
  }
  pieces.take(w.partials.max, slots);
  pieces.take(w.partials.sum, slots);
  pieces.take(w.partials.rank, slots);
  if (gradient) pieces.take(w.partials.keys, slots * shape.c);
  pieces.take(w.partials.finished, 1);
  w.bytes = pieces.used();
  return w;
}

// The slots of the splits from `split` on.
inline InfoNcePartials partials_from(const InfoNceWorkspace& w, const InfoNceShape& shape, int64_t split) {
  const int64_t slot = split * shape.n;
  const InfoNcePartials& p = w.partials;
  return {p.max + slot, p.sum + slot, p.rank + slot, p.keys == nullptr ? nullptr : p.keys + slot * shape.c, p.finished};
}

// operand [N, C]: the queries, normalized if wanted. Operand is float or the type of a tensor-core pass.
template <typename Operand>
cudaError_t launch_info_nce_operand(const InfoNceQueries& queries, void* operand, cudaStream_t stream);

template <typename Key>
cudaError_t launch_info_nce_generic(const InfoNcePassArguments<Key>& arguments, cudaStream_t stream);
constexpr int64_t kGenericRows = 16;
constexpr int64_t kGenericKeys = 32;

cudaError_t launch_info_nce_combine(const InfoNceQueries& queries, const InfoNceShape& shape,
                                    const InfoNceTemperature& temperature, const InfoNceContrast& contrast,
                                    const InfoNceWorkspace& workspace, const InfoNceOutputs& outputs,
                                    cudaStream_t stream);

// Sums of keys for the target distribution, and a repair of sums that masked keys made NaN; launches nothing without
// ids and label smoothing. Operand is the type of `workspace.keys`.
template <typename Queue, typename Operand>
cudaError_t launch_info_nce_target(const InfoNceQueries& queries, const Queue* queue, const InfoNceShape& shape,
                                   const InfoNceTemperature& temperature, const InfoNceContrast& contrast,
                                   const InfoNceWorkspace& workspace, cudaStream_t stream);

}  // namespace moco_ext::cuda
