#include "kernels/cuda/info_nce_launch.cuh"

namespace moco_ext::cuda {
MOCO_INSTANTIATE_INFO_NCE(__half)
}  // namespace moco_ext::cuda
