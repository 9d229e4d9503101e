// Intermediate results of the InfoNCE kernels, and their layout in the workspace.
//
// prepare -> a pass over the queue, divided into splits (info_nce_mma.cuh or info_nce_generic.cuh) -> combine. The
// Hopper pass (info_nce_sm90.cuh) does what prepare does, for the rows of each block.
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

// One row's partial results over one split, with p = exp((score - max) * row_scale / temperature).
struct InfoNcePartials {
  float* max;      // [N, splits] of the scores, about: p may be up to 2^20. A score is q . n / row_scale
  float* sum;      // [N, splits] of p
  uint32_t* rank;  // [N, splits] scores above the positive's
  float* keys;     // [N, splits, pitch] sum of p n, its first C elements; null without gradient
  int64_t splits;  // of a row, those of other passes included
  int64_t pitch;   // C rounded up to a multiple of 4
  __device__ int64_t slot(int64_t row, int64_t split) const { return row * splits + split; }
};

constexpr int64_t kNoPositive = INT64_MIN;

// Keys of a pass that are not negatives of a row.
struct InfoNceMask {
  const int64_t* row_ids;  // [N], where key_ids are given
  const int64_t* key_ids;  // [K] or null
  int64_t key_offset;      // key key_offset + row is the positive of row; kNoPositive: there is none
  bool same_id_positive;
  bool same_id_only;  // the others are masked out instead

  __host__ __device__ bool any() const { return key_ids != nullptr || of_batch(); }
  // The keys are the batch's, which prepare writes. Then the pass must not start early, because it loads keys first.
  __host__ __device__ bool of_batch() const { return key_offset != kNoPositive; }
  __device__ bool is_positive(int64_t row, int64_t key) const {
    return key_offset != kNoPositive && key == key_offset + row;
  }
  __device__ bool equal_ids(int64_t row, int64_t key) const {
    return key_ids != nullptr && row_ids[row] >= 0 && row_ids[row] == key_ids[key];
  }
  // Of the ids that are masked out, or positive.
  __device__ bool same_id(int64_t row, int64_t key) const { return equal_ids(row, key) != same_id_only; }
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

// What a row's scores are compared with: its key, else its target, else 0.
template <typename Query>
struct InfoNceAnchor {
  const Query* key;     // [N, C] the queries' own, or null
  const float* target;  // [N, C] taken as it is, or null
};

// Queries and their anchors of any type, for a pass that prepares its own operand.
struct InfoNceQueries {
  const void* query;    // [N, C]; like key and target aligned to 16 bytes
  const void* key;      // [N, C] of the same type, or null
  const float* target;  // [N, C] or null
  Dtype type;
  float eps;
  bool normalize;
};

template <typename T>
constexpr Dtype kDtypeOf = std::is_same_v<T, float>           ? Dtype::kFloat32
                           : std::is_same_v<T, __nv_bfloat16> ? Dtype::kBFloat16
                                                              : Dtype::kFloat16;

// A target distribution, for combine.
struct InfoNceTarget {
  bool plain;               // only the anchor
  bool own_key;             // a positive
  bool candidate;           // it is in the denominator
  const float* given;       // [N, C] beside an own key, or null
  const float* column_sum;  // [C] over all keys, or null without label smoothing
  const float* match_sum;   // [N, C] over the keys with the row's id, or null
  const int64_t* matches;   // [N], with match_sum
  InfoNceKeyCount queue_keys;
  int64_t batch_keys;  // 0, or M with in_batch
  float label_smoothing;
  bool same_id_positive;
};

struct InfoNceWorkspace {
  float* query_norm;        // [N]
  float* key_norm;          // [N]
  float* positive;          // [N_padded] q . anchor, not divided by row_scale
  float* row_scale;         // [N_padded] from the operand to unit queries: a power of two if prepare wrote it
  float* grad_temperature;  // [N], to be reduced
  unsigned* finished;       // [1] rows that combine has finished; prepare sets it to 0
  void* query;              // [N_padded, C] the query operand: normalized, divided by row_scale
  void* keys;               // [M, C] with in_batch: the keys as the pass reads them, normalized
  float* column_parts;      // [kColumnParts, C] with label smoothing
  float* column_sum;        // [C]
  float* match_sum;         // [N, C] with ids, if the target or label smoothing needs them
  int64_t* matches;         // [N]
  InfoNcePartials partials;
  int64_t n_padded;
  int64_t splits;        // of queue and batch
  int64_t queue_splits;  // come first
  size_t bytes;
};
constexpr int kColumnParts = 128;

inline bool needs_matches(const InfoNceContrast& contrast) {
  return contrast.row_ids != nullptr && (contrast.same_id_positive || contrast.label_smoothing > 0);
}

// Divides memory into pieces. A null base gives the size.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  void take(T*& pointer, int64_t count, size_t bytes = sizeof(T)) {
    pointer = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * bytes + 255) / 256 * 256;
  }
  void take(void*& pointer, int64_t count, size_t bytes) {
    char* piece = nullptr;
    take(piece, count, bytes);
    pointer = piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// A null base gives the size.
inline InfoNceWorkspace info_nce_workspace(void* base, const InfoNceShape& shape, const InfoNceContrast& contrast,
                                           int64_t block_rows, int64_t queue_splits, int64_t batch_splits,
                                           size_t operand_bytes, bool gradient) {
  InfoNceWorkspace w{};
  Pieces pieces(base);
  w.n_padded = (shape.n + block_rows - 1) / block_rows * block_rows;
  w.queue_splits = queue_splits;
  w.splits = queue_splits + batch_splits;
  const int64_t slots = w.splits * shape.n;
  pieces.take(w.query_norm, shape.n);
  pieces.take(w.key_norm, shape.n);
  pieces.take(w.positive, w.n_padded);
  pieces.take(w.row_scale, w.n_padded);
  pieces.take(w.grad_temperature, shape.n);
  pieces.take(w.finished, 1);
  pieces.take(w.query, w.n_padded * shape.c, operand_bytes);
  if (contrast.in_batch) pieces.take(w.keys, contrast.keys * shape.c, operand_bytes);
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
  w.partials.splits = w.splits;
  w.partials.pitch = (shape.c + 3) / 4 * 4;
  if (gradient) pieces.take(w.partials.keys, slots * w.partials.pitch);
  w.bytes = pieces.used();
  return w;
}

// Those of a pass whose first split is `split`.
inline InfoNcePartials partials_from(const InfoNceWorkspace& w, int64_t split) {
  const InfoNcePartials& p = w.partials;
  return {p.max + split, p.sum + split, p.rank + split, p.keys == nullptr ? nullptr : p.keys + split * p.pitch,
          p.splits,      p.pitch};
}

// Operand is the element type of `workspace.query`. query: null if the pass prepares it; then only the keys of the
// batch are prepared. scaled: queries of any norm are brought within the range of float16.
template <typename Query, typename Operand>
cudaError_t launch_info_nce_prepare(const Query* query, const Query* key, const InfoNceAnchor<Query>& anchor,
                                    const InfoNceShape& shape, const InfoNceOptions& options,
                                    const InfoNceContrast& contrast, const InfoNceWorkspace& workspace, bool scaled,
                                    cudaStream_t stream);

// One pass over `keys` into `partials` of `splits` splits.
template <typename Queue>
cudaError_t launch_info_nce_generic(const Queue* keys, const InfoNceKeyCount& count, const InfoNceMask& mask,
                                    const InfoNcePartials& partials, int64_t splits, const InfoNceShape& shape,
                                    const InfoNceOptions& options, const InfoNceWorkspace& workspace,
                                    cudaStream_t stream);
constexpr int64_t kGenericRows = 16;
constexpr int64_t kGenericKeys = 32;

template <typename Query>
cudaError_t launch_info_nce_combine(const Query* query, const InfoNceAnchor<Query>& anchor, const float* target,
                                    const InfoNceShape& shape, const InfoNceOptions& options,
                                    const InfoNceContrast& contrast, const InfoNceWorkspace& workspace,
                                    const InfoNceOutputs& outputs, cudaStream_t stream);

// Sums of keys for the target distribution, and a repair of sums that masked keys made NaN; launches nothing without
// ids and label smoothing. Operand as for prepare.
template <typename Queue, typename Operand>
cudaError_t launch_info_nce_target(const Queue* queue, const InfoNceShape& shape, const InfoNceOptions& options,
                                   const InfoNceContrast& contrast, const InfoNceWorkspace& workspace,
                                   cudaStream_t stream);

}  // namespace moco_ext::cuda
