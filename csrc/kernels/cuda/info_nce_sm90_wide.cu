#include "kernels/cuda/info_nce_sm90_wide.cuh"

namespace moco_ext::cuda {

namespace {

template <typename Queue, int columns>
cudaError_t launch_columns(const Sm90Arguments& arguments, dim3 grid, cudaStream_t stream) {
  using Tile = Sm90WideTile<Queue, columns>;
  const auto kernel = arguments.partials.keys != nullptr ? info_nce_sm90_wide_kernel<Queue, columns, true>
                                                         : info_nce_sm90_wide_kernel<Queue, columns, false>;
  return launch(Start::kEarly, kernel, grid, dim3(Tile::kThreads), Tile::kDynamicBytes, stream, arguments);
}

}  // namespace

template <typename Queue>
cudaError_t launch_info_nce_sm90_wide(const Sm90Arguments& arguments, dim3 grid, cudaStream_t stream) {
  if (arguments.c <= 512) return launch_columns<Queue, 512>(arguments, grid, stream);
  return launch_columns<Queue, 768>(arguments, grid, stream);
}

template cudaError_t launch_info_nce_sm90_wide<__nv_bfloat16>(const Sm90Arguments&, dim3, cudaStream_t);
template cudaError_t launch_info_nce_sm90_wide<__half>(const Sm90Arguments&, dim3, cudaStream_t);

}  // namespace moco_ext::cuda
