// x / max(||x||, eps) of each row, by a warp, or by a block if rows are long.
#include "kernels/cuda.h"
#include "kernels/cuda/cuda_launch.cuh"
#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {
namespace {

// ---- kernel

constexpr int kThreads = 256;
constexpr int64_t kLongRow = 2048;

// x, out [rows, cols]; norm [rows] or null. `team` threads per row: kWarp or kThreads.
template <int width, bool fits, int team, typename T>
__global__ __launch_bounds__(kThreads,
                             kRowBlocksPerMultiprocessor<fits>) void l2_normalize_kernel(const T* x, T* out,
                                                                                         float* norm, int64_t rows,
                                                                                         int64_t cols, float eps) {
  const int64_t index = int64_t{blockIdx.x} * (kThreads / team) + static_cast<int>(threadIdx.x) / team;
  if (index >= rows) return;  // the whole team
  const int member = static_cast<int>(threadIdx.x) % team;
  const TeamRow<width, fits, team, T> row(x + index * cols, cols, member);
  const float divisor = row.template norm<true>(eps);
  row.store(out + index * cols, 1.0f / divisor);
  if (norm != nullptr && member == 0) norm[index] = divisor;
}

// ---- launcher

template <int width, typename T>
cudaError_t launch_rows(const T* x, T* out, float* norm, int64_t rows, int64_t cols, float eps, cudaStream_t stream) {
  const bool is_long = cols > kLongRow;
  const int64_t blocks = is_long ? rows : (rows + kThreads / kWarp - 1) / (kThreads / kWarp);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;  // 17 G rows; long ones would not fit in memory
  constexpr bool kShort = width > 1;                     // the scalar path has no variant for short rows
  auto kernel = l2_normalize_kernel<width, false, kWarp, T>;
  if (is_long) kernel = l2_normalize_kernel<width, false, kThreads, T>;
  if (kShort && cols <= kWarp * width) kernel = l2_normalize_kernel<width, kShort, kWarp, T>;
  return launch(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, x, out, norm, rows, cols, eps);
}

}  // namespace

template <typename T>
cudaError_t l2_normalize(const T* x, T* out, float* norm, int64_t rows, int64_t cols, float eps, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  constexpr int kWidth = kVectorWidth<T, T>;
  const bool vectors = cols % kWidth == 0 && is_aligned<kWidth>(x) && is_aligned<kWidth>(out);
  return vectors ? launch_rows<kWidth>(x, out, norm, rows, cols, eps, stream)
                 : launch_rows<1>(x, out, norm, rows, cols, eps, stream);
}

#define MOCO_L2_NORMALIZE(T) \
  template cudaError_t l2_normalize(const T*, T*, float*, int64_t, int64_t, float, cudaStream_t);
MOCO_L2_NORMALIZE(float)
MOCO_L2_NORMALIZE(__nv_bfloat16)
MOCO_L2_NORMALIZE(__half)

}  // namespace moco_ext::cuda
