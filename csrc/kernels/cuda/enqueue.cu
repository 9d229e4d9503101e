// The circular queue write: normalize, cast, write and advance the pointer in one launch.
#include "kernels/cuda.h"
#include "kernels/cuda/cuda_launch.cuh"
#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {
namespace {

// ---- kernel

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 2048;  // fills any device; more would wait for the pointer's atomic

// While the kernel runs, queue_ptr is the pointer plus 2^40 for each block that has started: one atomic both reads the
// pointer and counts the blocks, without other memory. The low 40 bits are the pointer in two's complement.
constexpr int kPointerBits = 40;
constexpr int64_t kPointerLimit = int64_t{1} << (kPointerBits - 1);

// keys [B, C] into a queue of K rows, of which `queue` [rows, C] has those from `first` on. A warp takes a row.
template <int width, bool fits, typename Key, typename Queue>
__global__ __launch_bounds__(kThreads, kRowBlocksPerMultiprocessor<fits>) void enqueue_kernel(
    Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c, int64_t first, int64_t rows,
    bool normalize, float eps) {
  __shared__ int64_t first_slot;
  const int64_t skipped = b > k ? b - k : 0;  // rows that later rows of the same batch would overwrite
  if (threadIdx.x == 0) {
    const uint64_t before = atomicAdd(reinterpret_cast<unsigned long long*>(queue_ptr),  // NOLINT: CUDA's type
                                      1ull << kPointerBits);
    constexpr int kCountBits = 64 - kPointerBits;
    const int64_t pointer = static_cast<int64_t>(before << kCountBits) >> kCountBits;
    const uint64_t blocks_before = (before - static_cast<uint64_t>(pointer)) >> kPointerBits;
    const int64_t position = (pointer % k + k) % k;
    first_slot = (position + skipped) % k;
    // All other blocks have read the pointer, so it can be overwritten.
    if (blocks_before == gridDim.x - 1) *queue_ptr = (position + b) % k;
  }

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  bool know_slot = false;
  // All warps of a block run the loop equally often, because of the barrier in it.
  for (int64_t i = skipped + int64_t{blockIdx.x} * kRowsPerBlock; i < b; i += int64_t{gridDim.x} * kRowsPerBlock) {
    const bool has_row = i + warp < b;
    const TeamRow<width, fits, kWarp, Key> row(keys + (i + warp) * c, has_row ? c : 0, lane);
    const float factor = normalize ? 1.0f / row.norm(eps) : 1.0f;
    if (!know_slot) __syncthreads();  // here, so that the first row loads while the atomic runs
    know_slot = true;
    int64_t slot = first_slot + (i + warp - skipped);  // < 2 K
    if (slot >= k) slot -= k;
    slot -= first;
    if (has_row && slot >= 0 && slot < rows) row.store(queue + slot * c, factor);
  }
}

// ---- launcher

template <int width, typename Key, typename Queue>
cudaError_t launch_rows(Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c,
                        int64_t first, int64_t rows, bool normalize, float eps, cudaStream_t stream) {
  const int64_t written = b < k ? b : k;
  const int64_t blocks = written == 0 ? 1 : (written + kRowsPerBlock - 1) / kRowsPerBlock;
  constexpr bool kShort = width > 1;  // the scalar path has no variant for short rows
  auto kernel = enqueue_kernel<width, false, Key, Queue>;
  if (kShort && c <= kWarp * width) kernel = enqueue_kernel<width, kShort, Key, Queue>;
  return launch(kernel, static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream, queue,
                queue_ptr, keys, k, b, c, first, rows, normalize, eps);
}

}  // namespace

// Pointers are taken modulo K. One outside [-2^39, 2^39) is not advanced correctly; no write is out of bounds.
template <typename Key, typename Queue>
cudaError_t enqueue(Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c, int64_t first,
                    int64_t rows, bool normalize, float eps, cudaStream_t stream) {
  if (k <= 0 || k >= kPointerLimit) return cudaErrorInvalidValue;
  constexpr int kWidth = kVectorWidth<Key, Queue>;
  const bool vectors = c % kWidth == 0 && is_aligned<kWidth>(keys) && is_aligned<kWidth>(queue);
  return vectors ? launch_rows<kWidth>(queue, queue_ptr, keys, k, b, c, first, rows, normalize, eps, stream)
                 : launch_rows<1>(queue, queue_ptr, keys, k, b, c, first, rows, normalize, eps, stream);
}

#define MOCO_ENQUEUE(Key, Queue)                                                                                       \
  template cudaError_t enqueue(Queue*, int64_t*, const Key*, int64_t, int64_t, int64_t, int64_t, int64_t, bool, float, \
                               cudaStream_t);
#define MOCO_ENQUEUE_QUEUES(Key) \
  MOCO_ENQUEUE(Key, float)       \
  MOCO_ENQUEUE(Key, __nv_bfloat16) MOCO_ENQUEUE(Key, __half)
MOCO_ENQUEUE_QUEUES(float)
MOCO_ENQUEUE_QUEUES(__nv_bfloat16)
MOCO_ENQUEUE_QUEUES(__half)

}  // namespace moco_ext::cuda
