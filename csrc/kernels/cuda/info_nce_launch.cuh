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

// The fastest pass that the queue's type, alignment and number of features allow on the current device.
template <typename Queue>
InfoNcePass<Queue> choose_pass(const Queue* queue, const InfoNceShape& shape, const InfoNceOptions& options,
                               const InfoNceContrast& contrast, bool gradient) {
  if (reinterpret_cast<uintptr_t>(queue) % 16 != 0) return generic_pass<Queue>();
  InfoNcePass<Queue> pass = sm90_pass<Queue>(shape, contrast);
  pass.kind = PassKind::kSm90;
  if (pass.resident > 0) return pass;
  pass = mma_pass<Queue>(shape, options, gradient);
  pass.kind = PassKind::kMma;
  return pass.resident > 0 ? pass : generic_pass<Queue>();
}

template <typename Queue>
size_t info_nce_workspace_bytes(const Queue* queue, const InfoNceShape& shape, const InfoNceOptions& options,
                                const InfoNceContrast& contrast, bool gradient) {
  if (shape.n == 0) return 0;
  return pass_workspace(choose_pass(queue, shape, options, contrast, gradient), nullptr, shape, contrast, gradient)
      .bytes;
}

// Key: the queue's type, or that of the batch's keys in the workspace, which the generic pass takes as float.
template <typename Queue, typename Key>
cudaError_t launch_pass(const InfoNcePass<Queue>& pass, const Key* keys, const InfoNceKeyCount& count,
                        const InfoNceMask& mask, const InfoNceQueries& queries, const InfoNcePartials& partials,
                        int64_t splits, const InfoNceShape& shape, const InfoNceOptions& options,
                        const InfoNceWorkspace& w, cudaStream_t stream) {
  if constexpr (std::is_same_v<Key, Queue>) {
    if (pass.kind == PassKind::kMma) {
      const MmaArguments<Queue> arguments{static_cast<const uint32_t*>(w.query),
                                          keys,
                                          w.positive,
                                          w.row_scale,
                                          partials,
                                          shape.n,
                                          count,
                                          mask,
                                          {options.temperature, options.temperature_ptr},
                                          nullptr};
      const dim3 grid(static_cast<unsigned>(w.n_padded / pass.rows), static_cast<unsigned>(splits));
      return launch(mask.of_batch() ? Start::kAfterPrevious : Start::kEarly,
                    mask.any() ? pass.masked_kernel : pass.kernel, grid, dim3(pass.threads), pass.shared_bytes, stream,
                    arguments);
    }
    if (pass.kind == PassKind::kSm90) {
      return launch_info_nce_sm90(keys, count, mask, queries, partials, splits, shape, options, w, stream);
    }
  }
  return launch_info_nce_generic(keys, count, mask, partials, splits, shape, options, w, stream);
}

// Of no rows, the mean is NaN (all bits set) and everything else 0.
inline cudaError_t info_nce_of_no_rows(const InfoNceOutputs& outputs, cudaStream_t stream) {
  if (outputs.reduction == Reduction::kNone) return cudaSuccess;
  const int bits = outputs.reduction == Reduction::kMean ? 0xff : 0;
  const cudaError_t error = cudaMemsetAsync(outputs.reduced, bits, sizeof(float), stream);
  if (error != cudaSuccess || outputs.grad_temperature == nullptr) return error;
  return cudaMemsetAsync(outputs.grad_temperature, 0, sizeof(float), stream);
}

// prepare, unless the pass does it, the passes over queue and batch, combine.
template <typename Query, typename Queue>
cudaError_t info_nce(const Query* query, const Query* key, const Queue* queue, const float* target,
                     const InfoNceShape& shape, const InfoNceOptions& options, const InfoNceContrast& contrast,
                     const InfoNceOutputs& outputs, void* workspace, cudaStream_t stream) {
  if (shape.n == 0) return info_nce_of_no_rows(outputs, stream);
  const bool gradient = outputs.grad_query != nullptr;
  const InfoNcePass<Queue> pass = choose_pass(queue, shape, options, contrast, gradient);
  const InfoNceWorkspace w = pass_workspace(pass, workspace, shape, contrast, gradient);
  const bool own_key = key != nullptr && contrast.own_key != OwnKey::kExcluded;
  const InfoNceAnchor<Query> anchor{own_key ? key + contrast.key_offset * shape.c : nullptr, target};
  const InfoNceQueries queries{query, anchor.key, target, kDtypeOf<Query>, options.eps, options.normalize};
  const int64_t* const row_ids = contrast.row_ids;
  const bool positive = contrast.same_id_positive;
  const bool in_pass = pass.prepares && w.splits > 0;  // the queries are prepared there; without keys, no pass runs
  const auto run = [&]<typename Operand>() {           // the type of queries and keys in the passes
    cudaError_t error = launch_info_nce_prepare<Query, Operand>(in_pass ? nullptr : query, key, anchor, shape, options,
                                                                contrast, w, pass.kind != PassKind::kGeneric, stream);
    if (error == cudaSuccess && w.queue_splits > 0) {
      error = launch_pass(pass, queue, {shape.k, contrast.num_valid},
                          {row_ids, contrast.queue_ids, kNoPositive, positive, contrast.same_id_only}, queries,
                          partials_from(w, 0), w.queue_splits, shape, options, w, stream);
    }
    if (error == cudaSuccess && contrast.in_batch) {
      error = launch_pass(pass, static_cast<const Operand*>(w.keys), {contrast.keys, nullptr},
                          {row_ids, contrast.key_ids, contrast.key_offset, positive, contrast.same_id_only}, queries,
                          partials_from(w, w.queue_splits), w.splits - w.queue_splits, shape, options, w, stream);
    }
    if (error == cudaSuccess) {
      error = launch_info_nce_target<Queue, Operand>(queue, shape, options, contrast, w, stream);
    }
    if (error != cudaSuccess) return error;
    return launch_info_nce_combine(query, anchor, target, shape, options, contrast, w, outputs, stream);
  };
  if (pass.kind == PassKind::kGeneric) return run.template operator()<float>();
  return run.template operator()<Queue>();
}

#define MOCO_INSTANTIATE_INFO_NCE(Queue)                                                                    \
  template size_t info_nce_workspace_bytes<Queue>(const Queue*, const InfoNceShape&, const InfoNceOptions&, \
                                                  const InfoNceContrast&, bool);                            \
  MOCO_INSTANTIATE_INFO_NCE_PAIR(float, Queue)                                                              \
  MOCO_INSTANTIATE_INFO_NCE_PAIR(__nv_bfloat16, Queue)                                                      \
  MOCO_INSTANTIATE_INFO_NCE_PAIR(__half, Queue)
#define MOCO_INSTANTIATE_INFO_NCE_PAIR(Query, Queue)                                                              \
  template cudaError_t info_nce<Query, Queue>(const Query*, const Query*, const Queue*, const float*,             \
                                              const InfoNceShape&, const InfoNceOptions&, const InfoNceContrast&, \
                                              const InfoNceOutputs&, void*, cudaStream_t);

}  // namespace moco_ext::cuda
