#include "kernels/cuda/info_nce_sm90_wide.cuh"

namespace moco_ext::cuda {

namespace {

template <typename Queue, int columns>
cudaError_t launch_columns(const CUtensorMap& key_map, const InfoNcePassArguments<Queue>& arguments,
                           cudaStream_t stream) {
  using Tile = Sm90WideTile<Queue, columns>;
  const auto kernel = arguments.partials.keys != nullptr ? info_nce_sm90_wide_kernel<Queue, columns, true>
                                                         : info_nce_sm90_wide_kernel<Queue, columns, false>;
  const dim3 grid(static_cast<unsigned>((arguments.queries.n + kSm90GroupRows - 1) / kSm90GroupRows),
                  static_cast<unsigned>(arguments.splits));
  return launch(kernel, grid, dim3(Tile::kThreads), Tile::kDynamicBytes, stream, key_map, arguments);
}

}  // namespace

template <typename Queue>
cudaError_t launch_info_nce_sm90_wide(const CUtensorMap& key_map, const InfoNcePassArguments<Queue>& arguments,
                                      cudaStream_t stream) {
  if (arguments.queries.c <= 512) return launch_columns<Queue, 512>(key_map, arguments, stream);
  return launch_columns<Queue, 768>(key_map, arguments, stream);
}

#define MOCO_INFO_NCE_SM90_WIDE(Queue)                                                                          \
  template cudaError_t launch_info_nce_sm90_wide<Queue>(const CUtensorMap&, const InfoNcePassArguments<Queue>&, \
                                                        cudaStream_t);
MOCO_INFO_NCE_SM90_WIDE(__nv_bfloat16)
MOCO_INFO_NCE_SM90_WIDE(__half)

}  // namespace moco_ext::cuda
