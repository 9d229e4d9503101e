// What the InfoNCE kernels hand to one another, and where in the workspace it lies.
//
// prepare -> one pass over the queue, divided into splits (info_nce_mma.cuh or info_nce_generic.cuh) -> combine.
#pragma once

#include <cstddef>
#include <cstdint>

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
  float* max;      // [splits, N] of the scores; a score is q . n / row_scale
  float* sum;      // [splits, N] of p
  uint32_t* rank;  // [splits, N] scores above the positive's
  float* keys;     // [splits, N, C] sum of p n; null without gradient
};

struct InfoNceWorkspace {
  float* query_norm;  // [N]
  float* key_norm;    // [N]
  float* positive;    // [N_padded] q . k, not divided by row_scale
  float* row_scale;   // [N_padded] power of two that brings the query operand's largest element to [0.5, 1)
  void* query;        // [N_padded, C] the query operand: normalised, divided by row_scale
  InfoNcePartials partials;
  int64_t n_padded;
  int64_t splits;
  size_t bytes;
};

// `base` may be null, to learn the size.
inline InfoNceWorkspace info_nce_workspace(void* base, const InfoNceShape& shape, int64_t block_rows, int64_t splits,
                                           size_t operand_bytes, bool gradient) {
  InfoNceWorkspace w{};
  w.n_padded = (shape.n + block_rows - 1) / block_rows * block_rows;
  w.splits = splits;
  const auto take = [&](int64_t count, size_t bytes) {
    char* const pointer = static_cast<char*>(base) + w.bytes;
    w.bytes += (static_cast<size_t>(count) * bytes + 255) / 256 * 256;
    return static_cast<void*>(pointer);
  };
  const int64_t slots = splits * shape.n;
  w.query_norm = static_cast<float*>(take(shape.n, sizeof(float)));
  w.key_norm = static_cast<float*>(take(shape.n, sizeof(float)));
  w.positive = static_cast<float*>(take(w.n_padded, sizeof(float)));
  w.row_scale = static_cast<float*>(take(w.n_padded, sizeof(float)));
  w.query = take(w.n_padded * shape.c, operand_bytes);
  w.partials.max = static_cast<float*>(take(slots, sizeof(float)));
  w.partials.sum = static_cast<float*>(take(slots, sizeof(float)));
  w.partials.rank = static_cast<uint32_t*>(take(slots, sizeof(uint32_t)));
  if (gradient) w.partials.keys = static_cast<float*>(take(slots * shape.c, sizeof(float)));
  return w;
}

// Operand is the element type of `workspace.query`.
template <typename Query, typename Operand>
cudaError_t launch_info_nce_prepare(const Query* query, const Query* key, const InfoNceShape& shape,
                                    const InfoNceOptions& options, const InfoNceWorkspace& workspace,
                                    cudaStream_t stream);

template <typename Queue>
cudaError_t launch_info_nce_generic(const Queue* queue, const InfoNceShape& shape, const InfoNceOptions& options,
                                    const InfoNceWorkspace& workspace, cudaStream_t stream);
constexpr int64_t kGenericRows = 16;
constexpr int64_t kGenericKeys = 32;

template <typename Query>
cudaError_t launch_info_nce_combine(const Query* query, const Query* key, const InfoNceShape& shape,
                                    const InfoNceOptions& options, const InfoNceWorkspace& workspace,
                                    const InfoNceOutputs& outputs, cudaStream_t stream);

}  // namespace moco_ext::cuda
