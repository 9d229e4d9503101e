// What InfoNCE launches whatever the queue's tensor-core pass is: the kernels over rows, and the pass for any C.
#include "kernels/cuda/info_nce_generic.cuh"
#include "kernels/cuda/info_nce_rows.cuh"

namespace moco_ext::cuda {

namespace {

constexpr int kPrepareWarps = 4;

InfoNceTemperature temperature_of(const InfoNceOptions& options) {
  return {options.temperature, options.temperature_ptr};
}

RowOptions row_options(const InfoNceShape& shape, const InfoNceOptions& options) {
  return {shape.n, shape.c, options.eps, options.normalize};
}

}  // namespace

template <typename Query, typename Operand>
cudaError_t launch_info_nce_prepare(const Query* query, const Query* key, const InfoNceShape& shape,
                                    const InfoNceOptions& options, const InfoNceWorkspace& workspace,
                                    cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((workspace.n_padded + kPrepareWarps - 1) / kPrepareWarps);
  return launch(info_nce_prepare_kernel<Query, Operand>, dim3(blocks), dim3(32 * kPrepareWarps), 0, stream, query, key,
                row_options(shape, options), workspace);
}

template <typename Queue>
cudaError_t launch_info_nce_generic(const Queue* queue, const InfoNceShape& shape, const InfoNceOptions& options,
                                    const InfoNceWorkspace& workspace, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(workspace.n_padded / kGenericRows), static_cast<unsigned>(workspace.splits));
  const int64_t tiles = (shape.k + kGenericKeys - 1) / kGenericKeys;
  return launch(info_nce_generic_kernel<Queue>, grid, dim3(kGenericThreads), 0, stream, queue, shape.n, shape.k,
                shape.c, tiles, temperature_of(options), workspace);
}

template <typename Query>
cudaError_t launch_info_nce_combine(const Query* query, const Query* key, const InfoNceShape& shape,
                                    const InfoNceOptions& options, const InfoNceWorkspace& workspace,
                                    const InfoNceOutputs& outputs, cudaStream_t stream) {
  // Few rows mean many splits of each: more warps then, so that enough loads are in flight.
  const int warps = workspace.splits >= 4 * kCombineMaxWarps ? kCombineMaxWarps : 4;
  return launch(info_nce_combine_kernel<Query>, dim3(static_cast<unsigned>(shape.n)), dim3(32 * warps), 0, stream,
                query, key, row_options(shape, options), temperature_of(options), workspace, outputs);
}

#define MOCO_INSTANTIATE_PREPARE(Query, Operand)                \
  template cudaError_t launch_info_nce_prepare<Query, Operand>( \
      const Query*, const Query*, const InfoNceShape&, const InfoNceOptions&, const InfoNceWorkspace&, cudaStream_t);
#define MOCO_INSTANTIATE_QUERY(Query)                                                                  \
  MOCO_INSTANTIATE_PREPARE(Query, float)                                                               \
  MOCO_INSTANTIATE_PREPARE(Query, __nv_bfloat16)                                                       \
  MOCO_INSTANTIATE_PREPARE(Query, __half)                                                              \
  template cudaError_t launch_info_nce_combine<Query>(const Query*, const Query*, const InfoNceShape&, \
                                                      const InfoNceOptions&, const InfoNceWorkspace&,  \
                                                      const InfoNceOutputs&, cudaStream_t);
#define MOCO_INSTANTIATE_QUEUE(Queue)                                                                           \
  template cudaError_t launch_info_nce_generic<Queue>(const Queue*, const InfoNceShape&, const InfoNceOptions&, \
                                                      const InfoNceWorkspace&, cudaStream_t);
MOCO_INSTANTIATE_QUERY(float)
MOCO_INSTANTIATE_QUERY(__nv_bfloat16)
MOCO_INSTANTIATE_QUERY(__half)
MOCO_INSTANTIATE_QUEUE(float)
MOCO_INSTANTIATE_QUEUE(__nv_bfloat16)
MOCO_INSTANTIATE_QUEUE(__half)

}  // namespace moco_ext::cuda
