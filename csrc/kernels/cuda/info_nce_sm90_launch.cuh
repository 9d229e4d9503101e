// The Hopper pass (info_nce_sm90.cuh), for the launcher of info_nce.
#pragma once

#include <type_traits>

#include "kernels/cuda/info_nce_pass.cuh"
#include "kernels/cuda/info_nce_workspace.cuh"

namespace moco_ext::cuda {

// Keys per tile: limited by the registers of S besides O, and with float32 keys by shared memory.
constexpr int sm90_tile_keys(bool float32, int64_t columns) { return !float32 && columns <= 128 ? 128 : 64; }

// Wider rows have a kernel of their own (info_nce_sm90_wide.cuh), with 64 queries per block and smaller tiles.
constexpr bool sm90_is_wide(int64_t columns) { return columns > 256; }
constexpr int kSm90WideKeys = 32;

// A block has 128 queries and one split of the queue, or up to 64 and two splits.
constexpr bool sm90_two_splits(int64_t n) { return n <= 64; }

// Whether the device can run the pass, and it is enabled.
bool sm90_enabled();

// One pass over `keys`, 16-byte aligned, into `partials` of `splits` splits; computes the gradient if partials.keys is
// set.
template <typename Queue>
cudaError_t launch_info_nce_sm90(const Queue* keys, const InfoNceKeyCount& count, const InfoNceMask& mask,
                                 const InfoNceQueries& queries, const InfoNcePartials& partials, int64_t splits,
                                 const InfoNceShape& shape, const InfoNceOptions& options,
                                 const InfoNceWorkspace& workspace, cudaStream_t stream);

// The Hopper pass, without its kernel; resident is 0 if it is not used.
template <typename Queue>
InfoNcePass<Queue> sm90_pass(const InfoNceShape& shape, const InfoNceContrast& contrast) {
  constexpr bool kFloat32 = std::is_same_v<Queue, float>;
  const bool masked = contrast.in_batch || contrast.queue_ids != nullptr;
  const bool fits = shape.c <= (kFloat32 || masked ? 128 : 768);  // limited by registers
  int multiprocessors = 0;
  if (!fits || shape.c * sizeof(Queue) % 16 != 0 || !sm90_enabled() ||
      multiprocessor_count(&multiprocessors) != cudaSuccess) {
    return {};
  }
  if (sm90_is_wide(shape.c)) return {nullptr, 64, kSm90WideKeys, 0, 0, multiprocessors};
  const bool two = sm90_two_splits(shape.n);
  InfoNcePass<Queue> pass{
      nullptr, two ? 64 : 128, sm90_tile_keys(kFloat32, shape.c), 0, 0, int64_t{two ? 2 : 1} * multiprocessors};
  pass.prepares = true;
  return pass;
}

}  // namespace moco_ext::cuda
