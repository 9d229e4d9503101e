// The launcher of info_nce. Each queue type has a translation unit that instantiates it, to compile in parallel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/info_nce_mma_launch.cuh"
#include "kernels/cuda/info_nce_sm90_launch.cuh"

namespace moco_ext::cuda {

template <typename Queue>
InfoNcePass<Queue> generic_pass() {
  int multiprocessors = 0;
  if (multiprocessor_count(&multiprocessors) != cudaSuccess) multiprocessors = 1;
  return {nullptr,      kGenericRows, kGenericKeys, 0, 0, int64_t{kMaxBlocksPerMultiprocessor} * multiprocessors,
          sizeof(float)};
}

// The number of splits of the queue with the lowest estimated time: waves of resident blocks times the tiles of a
// block, plus the cost of its start and end.
inline int64_t choose_splits(int64_t row_blocks, int64_t tiles, int64_t resident) {
  constexpr int64_t kBlockCostTiles = 3;
  int64_t best = 1;
  int64_t best_cost = INT64_MAX;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t most = std::min({waves * resident / row_blocks, tiles, int64_t{65535}});  // gridDim.y
    if (most == 0) continue;
    const int64_t block_tiles = (tiles + most - 1) / most;
    if (const int64_t cost = waves * (block_tiles + kBlockCostTiles); cost < best_cost) {
      best_cost = cost;
      best = (tiles + block_tiles - 1) / block_tiles;  // fewer splits if the longest stays as long
    }
  }
  return best;
}

template <typename Queue>
InfoNceWorkspace pass_workspace(const InfoNcePass<Queue>& pass, void* base, const InfoNceShape& shape,
                                const InfoNceContrast& contrast, bool gradient) {
  const int64_t row_blocks = (shape.n + pass.rows - 1) / pass.rows;
  const auto splits = [&](int64_t keys) {
    return keys == 0 ? 0 : choose_splits(row_blocks, (keys + pass.keys - 1) / pass.keys, pass.resident);
  };
  return info_nce_workspace(base, shape, contrast, pass.rows, splits(shape.k),
                            contrast.in_batch ? splits(contrast.keys) : 0, pass.operand_bytes, gradient);
}

template <typename Queue>
size_t info_nce_workspace_bytes(const InfoNceShape& shape, const InfoNceOptions& options,
                                const InfoNceContrast& contrast, bool gradient) {
  if (shape.n == 0) return 0;
  // The pass also depends on the queue's alignment, which is not known here.
  size_t bytes = pass_workspace(generic_pass<Queue>(), nullptr, shape, contrast, gradient).bytes;
  if (const InfoNcePass<Queue> pass = mma_pass<Queue>(shape, options, gradient); pass.resident > 0) {
    bytes = std::max(bytes, pass_workspace(pass, nullptr, shape, contrast, gradient).bytes);
  }
  if (const InfoNcePass<Queue> pass = sm90_pass<Queue>(shape); pass.resident > 0) {
    bytes = std::max(bytes, pass_workspace(pass, nullptr, shape, contrast, gradient).bytes);
  }
  return bytes;
}

// prepare, the passes over queue and batch, combine. Operand is the element type of queries and keys in the passes.
template <typename Operand, typename Query, typename Queue, typename Pass>
cudaError_t launch_info_nce(const Query* query, const Query* key, const Queue* queue, const InfoNceShape& shape,
                            const InfoNceOptions& options, const InfoNceContrast& contrast, const InfoNceWorkspace& w,
                            const InfoNceOutputs& outputs, cudaStream_t stream, Pass&& pass) {
  const int64_t* const row_ids = contrast.key_ids == nullptr ? nullptr : contrast.key_ids + contrast.key_offset;
  const bool positive = contrast.same_id_positive;
  cudaError_t error = launch_info_nce_prepare<Query, Operand>(query, key, shape, options, contrast, w, stream);
  if (error == cudaSuccess && w.queue_splits > 0) {
    error = pass(queue, InfoNceKeyCount{shape.k, contrast.num_valid},
                 InfoNceMask{row_ids, contrast.queue_ids, kNoPositive, positive}, partials_from(w, shape, 0),
                 w.queue_splits);
  }
  if (error == cudaSuccess && contrast.in_batch) {
    error = pass(static_cast<const Operand*>(w.keys), InfoNceKeyCount{contrast.keys, nullptr},
                 InfoNceMask{row_ids, contrast.key_ids, contrast.key_offset, positive},
                 partials_from(w, shape, w.queue_splits), w.splits - w.queue_splits);
  }
  if (error == cudaSuccess) error = launch_info_nce_target<Queue, Operand>(queue, shape, options, contrast, w, stream);
  if (error != cudaSuccess) return error;
  return launch_info_nce_combine(query, key, shape, options, contrast, w, outputs, stream);
}

template <typename Query, typename Queue>
cudaError_t info_nce(const Query* query, const Query* key, const Queue* queue, const InfoNceShape& shape,
                     const InfoNceOptions& options, const InfoNceContrast& contrast, const InfoNceOutputs& outputs,
                     void* workspace, cudaStream_t stream) {
  if (shape.n == 0) return cudaSuccess;
  const bool gradient = outputs.grad_query != nullptr;
  const InfoNcePass<Queue> fast = mma_pass<Queue>(shape, options, gradient);
  if (fast.resident == 0 || reinterpret_cast<uintptr_t>(queue) % 16 != 0) {
    const InfoNceWorkspace w = pass_workspace(generic_pass<Queue>(), workspace, shape, contrast, gradient);
    const auto pass = [&](const auto* keys, const auto& count, const auto& mask, const auto& partials, int64_t splits) {
      return launch_info_nce_generic(keys, count, mask, partials, splits, shape, options, w, stream);
    };
    return launch_info_nce<float>(query, key, queue, shape, options, contrast, w, outputs, stream, pass);
  }
  if constexpr (sizeof(Queue) == 2) {
    if (const InfoNcePass<Queue> hopper = sm90_pass<Queue>(shape); hopper.resident > 0) {
      const InfoNceWorkspace w = pass_workspace(hopper, workspace, shape, contrast, gradient);
      const auto pass = [&](const Queue* keys, const auto& count, const auto& mask, const auto& partials,
                            int64_t splits) {
        return launch_info_nce_sm90(keys, count, mask, partials, splits, shape, options, w, stream);
      };
      return launch_info_nce<Queue>(query, key, queue, shape, options, contrast, w, outputs, stream, pass);
    }
  }
  const InfoNceWorkspace w = pass_workspace(fast, workspace, shape, contrast, gradient);
  const auto pass = [&](const Queue* keys, const InfoNceKeyCount& count, const InfoNceMask& mask,
                        const InfoNcePartials& partials, int64_t splits) {
    const MmaArguments<Queue> arguments{
        static_cast<const uint32_t*>(w.query),          keys,   w.positive, w.row_scale, partials, shape.n, count, mask,
        {options.temperature, options.temperature_ptr}, nullptr};
    const dim3 grid(static_cast<unsigned>(w.n_padded / fast.rows), static_cast<unsigned>(splits));
    return launch(mask.any() ? fast.masked_kernel : fast.kernel, grid, dim3(fast.threads), fast.shared_bytes, stream,
                  arguments);
  };
  return launch_info_nce<Queue>(query, key, queue, shape, options, contrast, w, outputs, stream, pass);
}

#define MOCO_INSTANTIATE_INFO_NCE(Queue)                                                                              \
  template size_t info_nce_workspace_bytes<Queue>(const InfoNceShape&, const InfoNceOptions&, const InfoNceContrast&, \
                                                  bool);                                                              \
  MOCO_INSTANTIATE_INFO_NCE_PAIR(float, Queue)                                                                        \
  MOCO_INSTANTIATE_INFO_NCE_PAIR(__nv_bfloat16, Queue)                                                                \
  MOCO_INSTANTIATE_INFO_NCE_PAIR(__half, Queue)
#define MOCO_INSTANTIATE_INFO_NCE_PAIR(Query, Queue)                                                                \
  template cudaError_t info_nce<Query, Queue>(const Query*, const Query*, const Queue*, const InfoNceShape&,        \
                                              const InfoNceOptions&, const InfoNceContrast&, const InfoNceOutputs&, \
                                              void*, cudaStream_t);

}  // namespace moco_ext::cuda
