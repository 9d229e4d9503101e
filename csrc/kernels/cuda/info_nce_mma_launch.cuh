// The choice of the tensor-core pass (info_nce_mma.cuh), for the launcher of info_nce.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cuda/info_nce_mma.cuh"
#include "kernels/cuda/info_nce_pass.cuh"

namespace moco_ext::cuda {

// 0 if the kernel cannot run on the current device. `cache` holds the result plus one for each device, because both the
// workspace's size and the launch need it at every step.
constexpr int kMaxDevices = 64;
template <typename... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads, int shared_bytes,
                        std::atomic<int> (&cache)[kMaxDevices]) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (device < kMaxDevices) {
    if (const int known = cache[device].load(std::memory_order_relaxed); known > 0) return known - 1;
  }
  int blocks = 0;
  int multiprocessors = 0;
  if (multiprocessor_count(&multiprocessors) != cudaSuccess ||
      max_blocks_per_multiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes)) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // otherwise the next launch would report it
    blocks = 0;
  }
  const int resident = std::min(blocks, kMaxBlocksPerMultiprocessor) * multiprocessors;
  if (device < kMaxDevices) cache[device].store(resident + 1, std::memory_order_relaxed);
  return resident;
}

// float32 keys: for precision 3 two float16 terms, for 2 one. For the gradient of keys, whose weights may be out of
// float16's range, as many bfloat16 terms.
template <typename Queue, int precision, int columns, MmaPass kPass>
using PassTile = std::conditional_t<
    !std::is_same_v<Queue, float>, MmaTile<Queue, Queue, 1, columns>,
    std::conditional_t<precision == 1 || kPass == MmaPass::kKeys, MmaTile<Queue, __nv_bfloat16, precision, columns>,
                       MmaTile<Queue, __half, precision - 1, columns>>>;

template <typename Queue, int precision, int columns, MmaPass kPass>
InfoNcePass<Queue> mma_pass() {
  using Tile = PassTile<Queue, precision, columns, kPass>;
  static std::atomic<int> cache[kMaxDevices];
  // The gradient of keys always has a mask, because each query has a positive among them.
  constexpr bool kMasked = kPass == MmaPass::kKeys;
  void (*const kernel)(MmaArguments<Queue>) = info_nce_mma_kernel<Tile, columns, kPass, kMasked>;
  void (*const masked_kernel)(MmaArguments<Queue>) = info_nce_mma_kernel<Tile, columns, kPass, true>;
  return {kernel,         Tile::kRows,        Tile::kKeys,
          Tile::kThreads, Tile::kSharedBytes, resident_blocks(kernel, Tile::kThreads, Tile::kSharedBytes, cache),
          sizeof(Queue),  masked_kernel};
}

template <typename Queue, int precision, MmaPass kPass>
InfoNcePass<Queue> mma_pass(int64_t columns) {
  switch (columns) {
    case 64:
      return mma_pass<Queue, precision, 64, kPass>();
    case 128:
      return mma_pass<Queue, precision, 128, kPass>();
    case 256:
      return mma_pass<Queue, precision, 256, kPass>();
    case 512:
      return mma_pass<Queue, precision, 512, kPass>();
    case 768:
      return mma_pass<Queue, precision, 768, kPass>();
    case 1024:
      return mma_pass<Queue, precision, 1024, kPass>();
    default:
      return {};
  }
}

template <typename Queue, MmaPass kPass>
InfoNcePass<Queue> mma_pass(const InfoNceShape& shape, const InfoNceOptions& options) {
  if constexpr (std::is_same_v<Queue, float>) {
    if (options.precision == 3) return mma_pass<Queue, 3, kPass>(shape.c);
    if (options.precision == 2) return mma_pass<Queue, 2, kPass>(shape.c);
  }
  return mma_pass<Queue, 1, kPass>(shape.c);
}

template <typename Queue>
InfoNcePass<Queue> mma_pass(const InfoNceShape& shape, const InfoNceOptions& options, bool gradient) {
  return gradient ? mma_pass<Queue, MmaPass::kGradient>(shape, options)
                  : mma_pass<Queue, MmaPass::kLoss>(shape, options);
}

}  // namespace moco_ext::cuda
