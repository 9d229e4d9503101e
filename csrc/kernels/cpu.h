// What the CPU kernels offer the op layer: typed pointers, int64 sizes; no torch.
//
// Threads and BLAS are the host framework's own, handed in by the op layer, so that thread settings users already know
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
  // c [m, n] = a [m, k] @ b + (accumulate ? c : 0), with b [k, n], or [n, k] when transpose_b. False: it failed.
  bool (*gemm_float)(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k, bool transpose_b,
                     bool accumulate);
  bool (*gemm_double)(const double* a, const double* b, double* c, int64_t m, int64_t n, int64_t k, bool transpose_b,
                      bool accumulate);
};

struct InfoNceShape {
  int64_t n;  // queries
  int64_t k;  // keys in the queue, >= 1
  int64_t c;  // features, >= 1
};

struct InfoNceOptions {
  double temperature;
  double eps;      // floor of a row's norm
  bool normalize;  // false: query and key rows are taken as they are, logits are unbounded
};

template <typename Accumulate>
struct InfoNceOutputs {
  Accumulate* loss;              // [N]
  Accumulate* lse;               // [N] logsumexp over the K+1 logits
  Accumulate* positive_logit;    // [N] divided by the temperature
  int64_t* rank;                 // [N] negatives scoring strictly above the positive
  Accumulate* grad_query;        // [N, C] d loss[n] / d query[n]; null: no gradient pass at all
  Accumulate* grad_key;          // [N, C] or null
  Accumulate* grad_temperature;  // [N] or null; needs grad_query
};

// query, key [N, C]; queue [K, C]. Scratch: O(N*C) a thread and one tile of logits a thread. False: a GEMM failed.
template <typename Query, typename Queue>
bool info_nce(const Host& host, const Query* query, const Query* key, const Queue* queue, const InfoNceShape& shape,
              const InfoNceOptions& options, const InfoNceOutputs<accumulate_t<Queue>>& outputs);

// x, out [rows, cols]; norm [rows] or null: max(||x||, eps)
template <typename T>
void l2_normalize(const Host& host, const T* x, T* out, accumulate_t<T>* norm, int64_t rows, int64_t cols, double eps);

// queue [K, C], queue_ptr [1], keys [B, C]: rows [ptr, ptr + B) mod K, then ptr = (ptr + B) mod K.
template <typename Key, typename Queue>
void enqueue(const Host& host, Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c,
             bool normalize, double eps);

// key = m * key + (1 - m) * query over elements [begin, end); on the calling thread, so that the caller can spread a
// whole list of tensors over the threads at once.
template <typename Key, typename Query>
void momentum_update(Key* key, const Query* query, int64_t begin, int64_t end, double m);

// The instruction set the vector loops run with: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace moco_ext::cpu
