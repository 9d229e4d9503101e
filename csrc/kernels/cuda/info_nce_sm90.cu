// The launcher of the Hopper pass, for devices of compute capability 9.0. MOCO_EXT_SM90=0 turns it off.
#include <cudaTypedefs.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/info_nce_sm90.cuh"
#include "kernels/cuda/info_nce_sm90_launch.cuh"

namespace moco_ext::cuda {

namespace {

// Compiled for anything but sm_90a, the kernel is empty.
bool has_hopper_code() {
#ifdef MOCO_EMULATE
  return true;
#else
  cudaFuncAttributes attributes{};
  const auto kernel = info_nce_sm90_kernel<Sm90Tile<__half, __half, 1, 64>, true, false>;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess &&
         attributes.numRegs > 64;
#endif
}

// Of the current device, in this build.
bool can_run_hopper() {
  static std::atomic<int> known[64];  // per device: 1 no, 2 yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
  if (const int answer = known[device].load(std::memory_order_relaxed); answer != 0) return answer == 2;
  int major = 0;
  int minor = 0;
  const bool hopper = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
                      major == 9 && minor == 0 && has_hopper_code();
  known[device].store(hopper ? 2 : 1, std::memory_order_relaxed);
  return hopper;
}

// Looked up in the driver, which is not linked.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

// x [rows, columns] in boxes of [box_rows, 128 bytes]; rows and columns beyond the end read as zeros.
template <typename Element>
bool encode(CUtensorMap& map, const Element* x, int64_t rows, int64_t columns, int box_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * sizeof(Element)};
  const cuuint32_t box[] = {128 / sizeof(Element), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  constexpr CUtensorMapDataType type = std::is_same_v<Element, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                       : std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encoder()(&map, type, 2, const_cast<Element*>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename Tile>
cudaError_t launch_tile(Sm90Arguments& arguments, const typename Tile::Queue* keys, dim3 grid, cudaStream_t stream) {
  if (!encode(arguments.key_map, keys, arguments.count.most, arguments.c, Tile::kKeys)) return cudaErrorInvalidValue;
  const bool gradient = arguments.partials.keys != nullptr;
  auto kernel = gradient ? info_nce_sm90_kernel<Tile, true, false> : info_nce_sm90_kernel<Tile, false, false>;
  if (arguments.mask.any()) {
    if constexpr (Tile::kColumns > 128)
      return cudaErrorNotSupported;
    else
      kernel = gradient ? info_nce_sm90_kernel<Tile, true, true> : info_nce_sm90_kernel<Tile, false, true>;
  }
  return launch(kernel, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, arguments);
}

template <typename Queue, typename Operand, int terms>
cudaError_t launch_width(Sm90Arguments& arguments, const Queue* keys, dim3 grid, cudaStream_t stream) {
  if (arguments.c <= 64) return launch_tile<Sm90Tile<Queue, Operand, terms, 64>>(arguments, keys, grid, stream);
  if (arguments.c <= 128) return launch_tile<Sm90Tile<Queue, Operand, terms, 128>>(arguments, keys, grid, stream);
  if constexpr (sizeof(Queue) == 2) {
    return launch_tile<Sm90Tile<Queue, Operand, terms, 256>>(arguments, keys, grid, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace

bool sm90_enabled() {
  static const bool wanted = [] {
    const char* const set = std::getenv("MOCO_EXT_SM90");
    return set == nullptr || std::strcmp(set, "0") != 0;
  }();
  return wanted && can_run_hopper() && encoder() != nullptr;
}

template <typename Queue>
cudaError_t launch_info_nce_sm90(const Queue* keys, const InfoNceKeyCount& count, const InfoNceMask& mask,
                                 const InfoNceQueries& queries, const InfoNcePartials& partials, int64_t splits,
                                 const InfoNceShape& shape, const InfoNceOptions& options, const InfoNceWorkspace& w,
                                 cudaStream_t stream) {
  Sm90Arguments arguments{};
  arguments.queries = queries;
  arguments.operand = {w.query, w.query_norm, w.key_norm, w.positive, w.row_scale, w.finished};
  arguments.partials = partials;
  arguments.n = shape.n;
  arguments.c = static_cast<int>(shape.c);
  arguments.splits = static_cast<int>(splits);
  arguments.streams = sm90_two_splits(shape.n) ? 2 : 1;
  arguments.count = count;
  arguments.mask = mask;
  arguments.temperature = {options.temperature, options.temperature_ptr};
  if constexpr (sizeof(Queue) == 2) {
    if (sm90_is_wide(shape.c)) {
      const dim3 grid(static_cast<unsigned>(w.n_padded / kSm90GroupRows), static_cast<unsigned>(splits));
      const bool encoded =
          encode(arguments.query_map, static_cast<const Queue*>(w.query), w.n_padded, shape.c, kSm90GroupRows) &&
          encode(arguments.key_map, keys, count.most, shape.c, kSm90WideKeys);
      return encoded ? launch_info_nce_sm90_wide<Queue>(arguments, grid, stream) : cudaErrorInvalidValue;
    }
  }
  const int64_t block_rows = arguments.streams == 2 ? kSm90GroupRows : 2 * kSm90GroupRows;
  const dim3 grid(static_cast<unsigned>(w.n_padded / block_rows),
                  static_cast<unsigned>((splits + arguments.streams - 1) / arguments.streams));
  if constexpr (std::is_same_v<Queue, float>) {
    if (options.precision == 3) return launch_width<float, __half, 2>(arguments, keys, grid, stream);
    if (options.precision == 2) return launch_width<float, __half, 1>(arguments, keys, grid, stream);
    return launch_width<float, __nv_bfloat16, 1>(arguments, keys, grid, stream);
  } else {
    return launch_width<Queue, Queue, 1>(arguments, keys, grid, stream);
  }
}

#define MOCO_INFO_NCE_SM90(Queue)                                                                              \
  template cudaError_t launch_info_nce_sm90<Queue>(                                                            \
      const Queue*, const InfoNceKeyCount&, const InfoNceMask&, const InfoNceQueries&, const InfoNcePartials&, \
      int64_t, const InfoNceShape&, const InfoNceOptions&, const InfoNceWorkspace&, cudaStream_t);
MOCO_INFO_NCE_SM90(float)
MOCO_INFO_NCE_SM90(__nv_bfloat16)
MOCO_INFO_NCE_SM90(__half)

}  // namespace moco_ext::cuda
