// What the launcher of info_nce knows about a pass over the queue.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moco_ext::cuda {

template <typename Element>
struct MmaArguments;

enum class PassKind { kGeneric, kMma, kSm90 };

// A pass over the queue, for the launcher. Only mma passes have their kernel here.
template <typename Queue>
struct InfoNcePass {
  void (*kernel)(MmaArguments<Queue>);
  int64_t rows;  // per block
  int64_t keys;  // per tile
  int threads;
  int shared_bytes;
  int64_t resident;  // blocks that run at the same time on the device
  size_t operand_bytes = sizeof(Queue);
  void (*masked_kernel)(MmaArguments<Queue>) = nullptr;  // for keys that are not negatives of all rows
  PassKind kind = PassKind::kGeneric;
  bool prepares = false;  // its own queries
};

// More blocks per multiprocessor hide little more latency, but each writes partial sums for its rows.
constexpr int kMaxBlocksPerMultiprocessor = 2;

}  // namespace moco_ext::cuda
