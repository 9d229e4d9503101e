// The launchers of the InfoNCE kernels without tensor cores.
#include "kernels/cuda/info_nce_combine.cuh"
#include "kernels/cuda/info_nce_generic.cuh"
#include "kernels/cuda/info_nce_target.cuh"

namespace moco_ext::cuda {

// A warp per row.
template <typename Operand>
__global__ void info_nce_operand_kernel(InfoNceQueries queries, Operand* operand) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= queries.n) return;
  const float factor = 1.0f / queries.divisor(warp_query_facts(queries, row).query_norm);
  for (int64_t i = row * queries.c + threadIdx.x % kWarp; i < (row + 1) * queries.c; i += kWarp) {
    operand[i] = from_float<Operand>(element(queries.query, queries.dtype, i) * factor);
  }
}

template <typename Operand>
cudaError_t launch_info_nce_operand(const InfoNceQueries& queries, void* operand, cudaStream_t stream) {
  constexpr int kWarps = 4;
  return launch(info_nce_operand_kernel<Operand>, dim3(static_cast<unsigned>((queries.n + kWarps - 1) / kWarps)),
                dim3(kWarp * kWarps), 0, stream, queries, static_cast<Operand*>(operand));
}

template <typename Key>
cudaError_t launch_info_nce_generic(const InfoNcePassArguments<Key>& arguments, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((arguments.queries.n + kGenericRows - 1) / kGenericRows),
                  static_cast<unsigned>(arguments.splits));
  return launch(info_nce_generic_kernel<Key>, grid, dim3(kGenericThreads), 0, stream, arguments);
}

template <typename Queue, typename Operand>
cudaError_t launch_info_nce_target(const InfoNceQueries& queries, const Queue* queue, const InfoNceShape& shape,
                                   const InfoNceTemperature& temperature, const InfoNceContrast& contrast,
                                   const InfoNceWorkspace& workspace, cudaStream_t stream) {
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
  if (contrast.key_ids == nullptr) return cudaSuccess;
  const int64_t* const row_ids = contrast.key_ids + contrast.key_offset;
  const dim3 rows(static_cast<unsigned>(shape.n));
  if (workspace.match_sum != nullptr) {
    const cudaError_t error = launch(info_nce_match_kernel<Queue, Operand>, rows, dim3(kMatchThreads), 0, stream,
                                     of_queue, of_batch, row_ids, shape.c, workspace);
    if (error != cudaSuccess) return error;
  }
  if (contrast.same_id_positive || workspace.partials.keys == nullptr) return cudaSuccess;
  return launch(info_nce_repair_kernel<Queue, Operand>, rows, dim3(kMatchThreads), 0, stream, queries, of_queue,
                of_batch, row_ids, temperature, workspace);
}

cudaError_t launch_info_nce_combine(const InfoNceQueries& queries, const InfoNceShape& shape,
                                    const InfoNceTemperature& temperature, const InfoNceContrast& contrast,
                                    const InfoNceWorkspace& workspace, const InfoNceOutputs& outputs,
                                    cudaStream_t stream) {
  // Few rows have many splits each, and need more warps to keep enough loads in flight.
  const int warps = workspace.splits >= 4 * kCombineMaxWarps ? kCombineMaxWarps : 4;
  const InfoNceTarget target{
      contrast.plain(),         workspace.column_sum,          workspace.match_sum,
      workspace.matches,        {shape.k, contrast.num_valid}, contrast.in_batch ? contrast.keys : 0,
      contrast.label_smoothing, contrast.same_id_positive};
  return launch(Start::kEarly, info_nce_combine_kernel, dim3(static_cast<unsigned>(queries.n)), dim3(32 * warps), 0,
                stream, queries, temperature, target, workspace, outputs);
}

#define MOCO_INSTANTIATE_KEY(Key)                                                                \
  template cudaError_t launch_info_nce_operand<Key>(const InfoNceQueries&, void*, cudaStream_t); \
  template cudaError_t launch_info_nce_generic<Key>(const InfoNcePassArguments<Key>&, cudaStream_t);
#define MOCO_INSTANTIATE_TARGET(Queue, Operand)                                                                    \
  template cudaError_t launch_info_nce_target<Queue, Operand>(                                                     \
      const InfoNceQueries&, const Queue*, const InfoNceShape&, const InfoNceTemperature&, const InfoNceContrast&, \
      const InfoNceWorkspace&, cudaStream_t);
MOCO_INSTANTIATE_KEY(float)
MOCO_INSTANTIATE_KEY(__nv_bfloat16)
MOCO_INSTANTIATE_KEY(__half)
MOCO_INSTANTIATE_TARGET(float, float)
MOCO_INSTANTIATE_TARGET(__nv_bfloat16, float)
MOCO_INSTANTIATE_TARGET(__half, float)
MOCO_INSTANTIATE_TARGET(__nv_bfloat16, __nv_bfloat16)
MOCO_INSTANTIATE_TARGET(__half, __half)

}  // namespace moco_ext::cuda
