// What the CUDA kernels offer the op layer: typed pointers, int64 sizes, a stream; no torch.
//
// Every launcher only enqueues work on `stream` (nothing synchronizes, nothing allocates, so all of it can be
// captured in a CUDA graph) and returns the launch error. Elements are float, __nv_bfloat16 or __half; tensors are
// contiguous; accumulation is float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace moco_ext::cuda {

struct InfoNceShape {
  int64_t n;  // queries
  int64_t k;  // keys in the queue, 0 only with in_batch or a queue still empty
  int64_t c;  // features, >= 1
};

struct InfoNceOptions {
  float temperature;             // used when temperature_ptr is null
  const float* temperature_ptr;  // [1] on the device, or null
  float eps;                     // floor of a row's norm
  bool normalize;                // false: query and key rows are taken as they are, logits are unbounded
  int precision;  // of float32 rows in products: 3 (float32), 2 (11 bits, as tf32 and fp16), 1 (bfloat16)
};

// What a query's own key is to it: its positive, its positive but not in the denominator, or nothing, not even a
// negative.
enum class OwnKey { kPositive, kDecoupled, kExcluded };

// What goes beyond one positive a row against a queue of negatives. By default nothing does.
struct InfoNceContrast {
  bool in_batch = false;               // all key rows but a query's own are its negatives too
  int64_t keys = 0;                    // M, of key [M, C] if in_batch; else N
  int64_t key_offset = 0;              // query i's own key is key row key_offset + i
  const int64_t* num_valid = nullptr;  // [1] on the device: keys of the queue that count; null: all
  float label_smoothing = 0;
  const int64_t* row_ids = nullptr;    // [N] or null; a negative id matches none
  const int64_t* key_ids = nullptr;    // [M] or null, with row_ids
  const int64_t* queue_ids = nullptr;  // [K] or null, with row_ids
  bool same_id_positive = false;       // a match is a further positive; else it is masked out
  OwnKey own_key = OwnKey::kPositive;
  bool same_id_only = false;  // what does not match is masked out
};

enum class Reduction { kNone, kMean, kSum };  // numbered as in torch

struct InfoNceOutputs {
  float* loss;               // [N]
  float* lse;                // [N] logsumexp over the logits
  float* positive_logit;     // [N] divided by the temperature
  int64_t* rank;             // [N] negatives scoring strictly above the positive; -1: no score to compare
  float* grad_query;         // [N, C] d loss[n] / d query[n], over N for kMean; null: no gradient pass at all
  float* grad_key;           // [N, C] or null; not with in_batch
  float* grad_temperature;   // [N], or its sum [1] with a reduction; or null; needs grad_query
  float* weights = nullptr;  // [N, 3] or null; with in_batch, for the keys' gradient
  float* reduced = nullptr;  // [1] mean or sum of loss; [N] a copy of it for kNone; or null
  Reduction reduction = Reduction::kNone;
};

// Scratch the launcher needs, in bytes, 256-byte aligned: O(N*C) times the splits of the queue, never N*K.
template <typename Queue>
size_t info_nce_workspace_bytes(const Queue* queue, const InfoNceShape& shape, const InfoNceOptions& options,
                                const InfoNceContrast& contrast, bool gradient);

// query [N, C]; key [N, C], or [M, C] with in_batch, then rounded to the queue's type, or null; queue [K, C]; target
// [N, C] or null: the mean of the keys under a target distribution, taken as it is. All but the queue are aligned to 16
// bytes.
template <typename Query, typename Queue>
cudaError_t info_nce(const Query* query, const Query* key, const Queue* queue, const float* target,
                     const InfoNceShape& shape, const InfoNceOptions& options, const InfoNceContrast& contrast,
                     const InfoNceOutputs& outputs, void* workspace, cudaStream_t stream);

// The gradient of keys [M, C] that are one another's negatives (in_batch), once the rows' own gradients are known:
// sum over rows of upstream * (p - target) * query / T, through the norm. lse, upstream [N]; weights [N, 3]: the
// target's share of each positive and of each class, and the row's positive's own p - target.
template <typename Query>
size_t info_nce_keys_backward_workspace_bytes(const InfoNceShape& shape, const InfoNceOptions& options,
                                              const InfoNceContrast& contrast);
template <typename Query>
cudaError_t info_nce_keys_backward(const Query* query, const Query* key, const InfoNceShape& shape,
                                   const InfoNceOptions& options, const InfoNceContrast& contrast, const float* lse,
                                   const float* weights, const float* upstream, float* grad_key, void* workspace,
                                   cudaStream_t stream);

// x, out [rows, cols]; norm [rows] or null: max(||x||, eps)
template <typename T>
cudaError_t l2_normalize(const T* x, T* out, float* norm, int64_t rows, int64_t cols, float eps, cudaStream_t stream);

// queue [K, C], queue_ptr [1] on the device, keys [B, C]: rows [ptr, ptr + B) mod K, then ptr = (ptr + B) mod K. Of a
// queue over several devices, `queue` [rows, C] has the rows from `first` on, and only those are written.
template <typename Key, typename Queue>
cudaError_t enqueue(Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c, int64_t first,
                    int64_t rows, bool normalize, float eps, cudaStream_t stream);

// key = m * key + (1 - m) * query over one list of tensors of mixed dtypes.
enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

struct MomentumTensor {
  void* key;
  const void* query;
  int64_t numel;
  Dtype key_dtype;
  Dtype query_dtype;
  void* low_precision = nullptr;  // 16-bit copy of a float32 key, written in the same pass; or null
  Dtype low_precision_dtype = Dtype::kBFloat16;
};

// m_ptr: [1] on the device, or null for the value m. Either all tensors have a low-precision copy or none has. One
// launch for every 1,000 tensors, 800 with copies.
cudaError_t momentum_update(const MomentumTensor* tensors, int64_t count, float m, const float* m_ptr,
                            cudaStream_t stream);

}  // namespace moco_ext::cuda
