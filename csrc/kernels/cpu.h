// What the CPU kernels offer the op layer: typed pointers, int64 sizes; no torch.
//
// Threads are the host framework's own, handed in by the op layer, so that thread settings users already know
// (torch.set_num_threads, OMP_NUM_THREADS) hold here too. Elements are float, double, bfloat16 or float16; tensors are
// contiguous; accumulation is float32, float64 for double.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels/cpu/half.h"

namespace moco_ext::cpu {

struct Host {
  int64_t threads;
  // Splits [0, n) into ranges of at least `grain` and runs body(begin, end) on them in parallel.
  void (*parallel_for)(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
};

struct InfoNceShape {
  int64_t n;  // queries
  int64_t k;  // keys in the queue, 0 only with in_batch or a queue still empty
  int64_t c;  // features, >= 1
};

struct InfoNceOptions {
  double temperature;
  double eps;      // floor of a row's norm
  bool normalize;  // false: query and key rows are taken as they are, logits are unbounded
};

// What a query's own key is to it: its positive, its positive but not in the denominator, or nothing, not even a
// negative.
enum class OwnKey { kPositive, kDecoupled, kExcluded };

// What goes beyond one positive a row against a queue of negatives. By default nothing does.
struct InfoNceContrast {
  bool in_batch = false;   // all key rows but a query's own are its negatives too
  int64_t keys = 0;        // M, of key [M, C] if in_batch; else N
  int64_t key_offset = 0;  // query i's own key is key row key_offset + i
  double label_smoothing = 0;
  const int64_t* row_ids = nullptr;    // [N] or null; a negative id matches none
  const int64_t* key_ids = nullptr;    // [M] or null, with row_ids
  const int64_t* queue_ids = nullptr;  // [K] or null, with row_ids
  bool same_id_positive = false;       // a match is a further positive; else it is masked out
  OwnKey own_key = OwnKey::kPositive;
  bool same_id_only = false;  // what does not match is masked out
};

enum class Reduction { kNone, kMean, kSum };  // numbered as in torch

template <typename Accumulate>
struct InfoNceOutputs {
  Accumulate* loss;               // [N]
  Accumulate* lse;                // [N] logsumexp over the logits
  Accumulate* positive_logit;     // [N] divided by the temperature
  int64_t* rank;                  // [N] negatives scoring strictly above the positive; -1: no score to compare
  Accumulate* grad_query;         // [N, C] d loss[n] / d query[n], over N for kMean; null: no gradient pass at all
  Accumulate* grad_key;           // [N, C] or null; not with in_batch
  Accumulate* grad_temperature;   // [N], or its sum [1] with a reduction; or null; needs grad_query
  Accumulate* weights = nullptr;  // [N, 3] or null; with in_batch, for the keys' gradient
  Accumulate* reduced = nullptr;  // [1] mean or sum of loss; [N] a copy of it for kNone; or null
  Reduction reduction = Reduction::kNone;
};

// query [N, C]; key [N, C], or [M, C] with in_batch, or null; queue [K, C]; target [N, C] or null: the mean of the keys
// under a target distribution, taken as it is. Scratch: O(N*C) a thread and a tile of logits.
template <typename Query, typename Queue>
void info_nce(const Host& host, const Query* query, const Query* key, const Queue* queue,
              const accumulate_t<Queue>* target, const InfoNceShape& shape, const InfoNceOptions& options,
              const InfoNceContrast& contrast, const InfoNceOutputs<accumulate_t<Queue>>& outputs);

// The gradient of keys [M, C] that are one another's negatives (in_batch), once the rows' own gradients are known:
// sum over rows of upstream * (p - target) * query / T, through the norm. lse, upstream [N]; weights [N, 3]: the
// target's share of each positive and of each class, and the row's positive's own p - target.
template <typename Query>
void info_nce_keys_backward(const Host& host, const Query* query, const Query* key, const InfoNceShape& shape,
                            const InfoNceOptions& options, const InfoNceContrast& contrast,
                            const accumulate_t<Query>* lse, const accumulate_t<Query>* weights,
                            const accumulate_t<Query>* upstream, accumulate_t<Query>* grad_key);

// similarity, index [N, k]: the k keys with the highest scores, highest first, equal ones by index; of fewer keys -inf
// and -1 from there on. query [N, C], queue [K, C]
template <typename Query, typename Queue>
void nearest_keys(const Host& host, const Query* query, const Queue* queue, const InfoNceShape& shape, int64_t k,
                  bool normalize, double eps, accumulate_t<Queue>* similarity, int64_t* index);

// x, out [rows, cols]; norm [rows] or null: max(||x||, eps)
template <typename T>
void l2_normalize(const Host& host, const T* x, T* out, accumulate_t<T>* norm, int64_t rows, int64_t cols, double eps);

// queue [K, C], queue_ptr [1], keys [B, C]: rows [ptr, ptr + B) mod K, then ptr = (ptr + B) mod K. Of a queue over
// several processes, `queue` [rows, C] has the rows from `first` on, and only those are written.
template <typename Key, typename Queue>
void enqueue(const Host& host, Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c,
             int64_t first, int64_t rows, bool normalize, double eps);

// key = m * key + (1 - m) * query over elements [begin, end); on the calling thread, so that the caller can spread a
// whole list of tensors over the threads at once.
template <typename Key, typename Query>
void momentum_update(Key* key, const Query* query, int64_t begin, int64_t end, double m);

// to [n] = from [n], rounded to its type; on the calling thread.
template <typename To>
void copy(const float* from, To* to, int64_t n);

// What changes the colors of a view, in moco_ext.data.augment's numbering of the jitter's steps.
enum class ColorStep : int64_t {
  kNone = -1,
  kBrightness,
  kContrast,
  kSaturation,
  kHue,
  kGray,
  kBlur,
  kSolarize,
  kFlip
};

// images, out [N, 3, height, width]; steps [N, count], ColorSteps in order; factors [N, 4]: of brightness, contrast and
// saturation, and the shift of the hue in turns; kernels [N, taps], taps odd: of the blur, symmetric, zeros outside.
// In float32 between 0 and 1, rounded once. Scratch: an image a thread.
void color_steps(const Host& host, const uint8_t* images, uint8_t* out, int64_t n, int64_t height, int64_t width,
                 const int64_t* steps, int64_t count, const float* factors, const float* kernels, int64_t taps);

// The instruction set the vector loops run with: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace moco_ext::cpu
