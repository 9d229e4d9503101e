// The circular queue write: normalise, cast, write and advance the pointer in one launch.
#include "kernels/cuda.h"
#include "kernels/cuda/cuda_launch.cuh"
#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {
namespace {

// ---- kernel

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 2048;  // fills any device; more would queue up at the pointer's atomic

// While the kernel runs, queue_ptr holds the position in its low bits and the number of blocks that have come in the
// bits above, so that one atomic both reads the pointer and counts, and no memory beyond the pointer is needed.
constexpr int kPositionBits = 40;
constexpr uint64_t kPositionMask = (uint64_t{1} << kPositionBits) - 1;

// queue [K, C], keys [B, C]. A warp takes a row.
template <int width, bool fits, typename Key, typename Queue>
__global__ __launch_bounds__(kThreads, kRowBlocksPerMultiprocessor<fits>) void enqueue_kernel(
    Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c, bool normalize, float eps) {
  __shared__ int64_t first_slot;
  const int64_t skipped = b > k ? b - k : 0;  // rows that later rows of the same batch would overwrite
  if (threadIdx.x == 0) {
    const uint64_t arrived = atomicAdd(reinterpret_cast<unsigned long long*>(queue_ptr),  // NOLINT: CUDA's own type
                                       1ull << kPositionBits);
    const int64_t position = static_cast<int64_t>(arrived & kPositionMask) % k;
    first_slot = (position + skipped) % k;
    // Every other block has read the position by now, so nobody misses it when it goes.
    if (arrived >> kPositionBits == gridDim.x - 1) *queue_ptr = (position + b) % k;
  }

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  bool know_slot = false;
  // The loop's count is the block's, not the warp's, because of the barrier in it.
  for (int64_t i = skipped + int64_t{blockIdx.x} * kRowsPerBlock; i < b; i += int64_t{gridDim.x} * kRowsPerBlock) {
    const bool mine = i + warp < b;
    const TeamRow<width, fits, kWarp, Key> row(keys + (i + warp) * c, mine ? c : 0, lane);
    const float factor = normalize ? 1.0f / row.norm(eps) : 1.0f;
    if (!know_slot) __syncthreads();  // the first row is on its way while the atomic is
    know_slot = true;
    int64_t slot = first_slot + (i + warp - skipped);  // < 2 K
    if (slot >= k) slot -= k;
    if (mine) row.store(queue + slot * c, factor);
  }
}

// ---- launcher

template <int width, typename Key, typename Queue>
cudaError_t launch_rows(Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c,
                        bool normalize, float eps, cudaStream_t stream) {
  const int64_t rows = b < k ? b : k;
  const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  constexpr bool kShort = width > 1;  // the scalar path has no variant for short rows
  auto kernel = enqueue_kernel<width, false, Key, Queue>;
  if (kShort && c <= kWarp * width) kernel = enqueue_kernel<width, kShort, Key, Queue>;
  return launch(kernel, static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream, queue,
                queue_ptr, keys, k, b, c, normalize, eps);
}

}  // namespace

// The pointer must be in [0, 2^40); one beyond K counts modulo K.
template <typename Key, typename Queue>
cudaError_t enqueue(Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c, bool normalize,
                    float eps, cudaStream_t stream) {
  if (k <= 0 || static_cast<uint64_t>(k) > kPositionMask) return cudaErrorInvalidValue;
  if (b == 0) return cudaSuccess;
  constexpr int kWidth = kVectorWidth<Key, Queue>;
  const bool vectors = c % kWidth == 0 && is_aligned<kWidth>(keys) && is_aligned<kWidth>(queue);
  return vectors ? launch_rows<kWidth>(queue, queue_ptr, keys, k, b, c, normalize, eps, stream)
                 : launch_rows<1>(queue, queue_ptr, keys, k, b, c, normalize, eps, stream);
}

#define MOCO_ENQUEUE(Key, Queue) \
  template cudaError_t enqueue(Queue*, int64_t*, const Key*, int64_t, int64_t, int64_t, bool, float, cudaStream_t);
#define MOCO_ENQUEUE_QUEUES(Key) \
  MOCO_ENQUEUE(Key, float)       \
  MOCO_ENQUEUE(Key, __nv_bfloat16) MOCO_ENQUEUE(Key, __half)
MOCO_ENQUEUE_QUEUES(float)
MOCO_ENQUEUE_QUEUES(__nv_bfloat16)
MOCO_ENQUEUE_QUEUES(__half)

}  // namespace moco_ext::cuda
