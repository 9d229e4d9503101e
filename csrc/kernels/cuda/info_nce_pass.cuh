// What the launcher of info_nce knows about a pass over the queue.
#pragma once

#include <cstdint>

#include "kernels/cuda/info_nce_workspace.cuh"

namespace moco_ext::cuda {

struct InfoNceColumn;

enum class PassKind { kGeneric, kMma, kSm90 };

// A pass over the queue, for the launcher. Only mma passes have their kernel here.
template <typename Queue>
struct InfoNcePass {
  void (*kernel)(InfoNcePassArguments<Queue>, const InfoNceColumn*);
  int64_t rows;  // per block
  int64_t keys;  // per tile
  int threads;
  int shared_bytes;
  int64_t resident;  // blocks that run at the same time on the device
  // For keys that are not negatives of all rows.
  void (*masked_kernel)(InfoNcePassArguments<Queue>, const InfoNceColumn*) = nullptr;
  PassKind kind = PassKind::kGeneric;
};

// More blocks per multiprocessor hide little more latency, but each writes partial sums for its rows.
constexpr int kMaxBlocksPerMultiprocessor = 2;

}  // namespace moco_ext::cuda
