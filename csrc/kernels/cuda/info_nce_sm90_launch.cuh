// The Hopper pass (info_nce_sm90.cuh), for the launcher of info_nce.
#pragma once

#include "kernels/cuda/info_nce_pass.cuh"
#include "kernels/cuda/info_nce_workspace.cuh"

namespace moco_ext::cuda {

constexpr int64_t kSm90Rows = 128;  // per block; one block runs on a multiprocessor at a time

// Keys per tile for this number of features; 0 if the pass cannot run or is not enabled.
int64_t sm90_tile_keys(int64_t columns);

// One pass over `keys`, 16-byte aligned, into `partials` of `splits` splits; computes the gradient if partials.keys is
// set.
template <typename Element>
cudaError_t launch_info_nce_sm90(const Element* keys, const InfoNceKeyCount& count, const InfoNceMask& mask,
                                 const InfoNcePartials& partials, int64_t splits, const InfoNceShape& shape,
                                 const InfoNceOptions& options, const InfoNceWorkspace& workspace, cudaStream_t stream);

// The Hopper pass, without its kernel; resident is 0 if it is not used.
template <typename Queue>
InfoNcePass<Queue> sm90_pass(const InfoNceShape& shape) {
  const int64_t keys = sizeof(Queue) == 2 ? sm90_tile_keys(shape.c) : 0;
  int multiprocessors = 0;
  if (keys == 0 || multiprocessor_count(&multiprocessors) != cudaSuccess) return {};
  return {nullptr, kSm90Rows, keys, 0, 0, multiprocessors};
}

}  // namespace moco_ext::cuda
