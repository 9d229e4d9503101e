// The InfoNCE kernels that do not depend on the tensor-core pass: those over rows, and the generic pass.
#include <algorithm>

#include "kernels/cuda/info_nce_combine.cuh"
#include "kernels/cuda/info_nce_generic.cuh"
#include "kernels/cuda/info_nce_target.cuh"

namespace moco_ext::cuda {

namespace {

InfoNceTemperature temperature_of(const InfoNceOptions& options) {
  return {options.temperature, options.temperature_ptr};
}

RowOptions row_options(const InfoNceShape& shape, const InfoNceOptions& options) {
  return {shape.n, shape.c, options.eps, options.normalize};
}

}  // namespace

template <typename Query, typename Operand>
cudaError_t launch_info_nce_prepare(const Query* query, const Query* key, const InfoNceAnchor<Query>& anchor,
                                    const InfoNceShape& shape, const InfoNceOptions& options,
                                    const InfoNceContrast& contrast, const InfoNceWorkspace& workspace, bool scaled,
                                    cudaStream_t stream) {
  const auto prepare = [&](const Query* x, const InfoNceAnchor<Query>& of_x, int64_t n, int64_t padded,
                           const InfoNceOperand<Operand>& operand) {
    const RowOptions rows{n, shape.c, options.eps, options.normalize};
    return launch(info_nce_prepare_kernel<Query, Operand>, row_blocks(padded), dim3(32 * kRowWarps), 0, stream, x, of_x,
                  rows, padded, operand);
  };
  const InfoNceWorkspace& w = workspace;
  cudaError_t error = cudaSuccess;
  if (query != nullptr) {
    error = prepare(
        query, anchor, shape.n, w.n_padded,
        {static_cast<Operand*>(w.query), w.query_norm, w.key_norm, w.positive, w.row_scale, w.finished, scaled});
  }
  if (error != cudaSuccess || !contrast.in_batch) return error;
  return prepare(key, {}, contrast.keys, contrast.keys, {static_cast<Operand*>(w.keys), nullptr});
}

template <typename Queue>
cudaError_t launch_info_nce_generic(const Queue* keys, const InfoNceKeyCount& count, const InfoNceMask& mask,
                                    const InfoNcePartials& partials, int64_t splits, const InfoNceShape& shape,
                                    const InfoNceOptions& options, const InfoNceWorkspace& workspace,
                                    cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(workspace.n_padded / kGenericRows), static_cast<unsigned>(splits));
  return launch(mask.of_batch() ? Start::kAfterPrevious : Start::kEarly, info_nce_generic_kernel<Queue>, grid,
                dim3(kGenericThreads), 0, stream, keys, count, mask, partials, shape.n, shape.c,
                temperature_of(options), workspace);
}

template <typename Queue, typename Operand>
cudaError_t launch_info_nce_target(const Queue* queue, const InfoNceShape& shape, const InfoNceOptions& options,
                                   const InfoNceContrast& contrast, const InfoNceWorkspace& workspace,
                                   cudaStream_t stream) {
  const InfoNceSource<Queue> of_queue{queue, {shape.k, contrast.num_valid}, contrast.queue_ids, kNoPositive};
  const InfoNceSource<Operand> of_batch{contrast.in_batch ? static_cast<const Operand*>(workspace.keys) : nullptr,
                                        {contrast.keys, nullptr},
                                        contrast.key_ids,
                                        contrast.key_offset};
  if (workspace.column_sum != nullptr) {
    constexpr int kThreads = 128;
    const auto columns = static_cast<unsigned>((shape.c + kThreads - 1) / kThreads);
    cudaError_t error = launch(info_nce_column_parts_kernel<Queue, Operand>, dim3(columns, kColumnParts),
                               dim3(kThreads), 0, stream, of_queue, of_batch, shape.c, workspace.column_parts);
    if (error != cudaSuccess) return error;
    error = launch(info_nce_column_sum_kernel, dim3(columns), dim3(kThreads), 0, stream, workspace.column_parts,
                   shape.c, workspace.column_sum);
    if (error != cudaSuccess) return error;
  }
  const bool own_masked = contrast.in_batch && contrast.own_key == OwnKey::kExcluded;
  if (contrast.row_ids == nullptr && !own_masked) return cudaSuccess;
  const dim3 rows(static_cast<unsigned>(shape.n));
  if (workspace.match_sum != nullptr) {
    const cudaError_t error = launch(info_nce_match_kernel<Queue, Operand>, rows, dim3(kMatchThreads), 0, stream,
                                     of_queue, of_batch, contrast.row_ids, shape.c, workspace);
    if (error != cudaSuccess) return error;
  }
  if ((contrast.same_id_positive && !own_masked) || workspace.partials.keys == nullptr) return cudaSuccess;
  return launch(info_nce_repair_kernel<Queue, Operand>, rows, dim3(kMatchThreads), 0, stream, of_queue, of_batch,
                contrast.row_ids, contrast.same_id_positive, contrast.same_id_only, shape.c, temperature_of(options),
                workspace);
}

template <typename Query>
cudaError_t launch_info_nce_combine(const Query* query, const InfoNceAnchor<Query>& anchor, const float* target,
                                    const InfoNceShape& shape, const InfoNceOptions& options,
                                    const InfoNceContrast& contrast, const InfoNceWorkspace& workspace,
                                    const InfoNceOutputs& outputs, cudaStream_t stream) {
  const CombineShape blocks = combine_shape(shape.n, outputs.grad_query == nullptr ? 0 : shape.c, workspace.splits);
  const auto grid = static_cast<unsigned>((shape.n + blocks.rows - 1) / blocks.rows);
  const bool own_key = anchor.key != nullptr;
  const float* const given = own_key ? target : nullptr;
  const bool plain = given == nullptr && contrast.row_ids == nullptr && contrast.label_smoothing == 0;
  const InfoNceTarget row_target{plain || (!own_key && target != nullptr),
                                 own_key,
                                 own_key && contrast.own_key == OwnKey::kPositive,
                                 given,
                                 workspace.column_sum,
                                 workspace.match_sum,
                                 workspace.matches,
                                 {shape.k, contrast.num_valid},
                                 contrast.in_batch ? contrast.keys : 0,
                                 contrast.label_smoothing,
                                 contrast.same_id_positive};
  return launch(Start::kEarly, info_nce_combine_kernel<Query>, dim3(grid), blocks.threads(),
                static_cast<size_t>(blocks.warps()) * 32 * sizeof(float4), stream, query, anchor,
                row_options(shape, options), temperature_of(options), row_target, workspace, outputs, blocks);
}

#define MOCO_INSTANTIATE_PREPARE(Query, Operand)                                                           \
  template cudaError_t launch_info_nce_prepare<Query, Operand>(                                            \
      const Query*, const Query*, const InfoNceAnchor<Query>&, const InfoNceShape&, const InfoNceOptions&, \
      const InfoNceContrast&, const InfoNceWorkspace&, bool, cudaStream_t);
#define MOCO_INSTANTIATE_QUERY(Query)                                                                      \
  MOCO_INSTANTIATE_PREPARE(Query, float)                                                                   \
  MOCO_INSTANTIATE_PREPARE(Query, __nv_bfloat16)                                                           \
  MOCO_INSTANTIATE_PREPARE(Query, __half)                                                                  \
  template cudaError_t launch_info_nce_combine<Query>(                                                     \
      const Query*, const InfoNceAnchor<Query>&, const float*, const InfoNceShape&, const InfoNceOptions&, \
      const InfoNceContrast&, const InfoNceWorkspace&, const InfoNceOutputs&, cudaStream_t);
#define MOCO_INSTANTIATE_TARGET(Queue, Operand)                                                              \
  template cudaError_t launch_info_nce_target<Queue, Operand>(const Queue*, const InfoNceShape&,             \
                                                              const InfoNceOptions&, const InfoNceContrast&, \
                                                              const InfoNceWorkspace&, cudaStream_t);
#define MOCO_INSTANTIATE_QUEUE(Queue)                                                                           \
  template cudaError_t launch_info_nce_generic<Queue>(const Queue*, const InfoNceKeyCount&, const InfoNceMask&, \
                                                      const InfoNcePartials&, int64_t, const InfoNceShape&,     \
                                                      const InfoNceOptions&, const InfoNceWorkspace&, cudaStream_t);
MOCO_INSTANTIATE_QUERY(float)
MOCO_INSTANTIATE_QUERY(__nv_bfloat16)
MOCO_INSTANTIATE_QUERY(__half)
MOCO_INSTANTIATE_QUEUE(float)
MOCO_INSTANTIATE_QUEUE(__nv_bfloat16)
MOCO_INSTANTIATE_QUEUE(__half)
MOCO_INSTANTIATE_TARGET(float, float)
MOCO_INSTANTIATE_TARGET(__nv_bfloat16, float)
MOCO_INSTANTIATE_TARGET(__half, float)
MOCO_INSTANTIATE_TARGET(__nv_bfloat16, __nv_bfloat16)
MOCO_INSTANTIATE_TARGET(__half, __half)

}  // namespace moco_ext::cuda
