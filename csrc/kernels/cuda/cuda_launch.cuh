// Launching a kernel, on the device or (MOCO_EMULATE) in the host emulator of csrc/tests/emulator.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#ifdef MOCO_EMULATE
#include "emulator.h"
#endif

// The block's dynamic shared memory, as `unsigned char* name`, 128-byte aligned.
#ifdef MOCO_EMULATE
#define MOCO_DYNAMIC_SHARED(name) unsigned char* const name = emu::dynamic_shared()
#else
#define MOCO_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace moco_ext::cuda {

constexpr size_t kDefaultSharedBytes = 48 * 1024;  // a block may use without opting in

// A kernel must opt in to more dynamic shared memory than the default, once per device; opting in again is cheap.
template <typename... Parameters>
cudaError_t allow_dynamic_shared(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes <= kDefaultSharedBytes) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

template <typename... Parameters>
cudaError_t max_blocks_per_multiprocessor(int* blocks, void (*kernel)(Parameters...), int threads, size_t bytes) {
  if (const cudaError_t error = allow_dynamic_shared(kernel, bytes); error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads, bytes);
}

// Of the current device.
inline cudaError_t multiprocessor_count(int* count) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (const cudaError_t error = allow_dynamic_shared(kernel, shared_bytes); error != cudaSuccess) return error;
#ifdef MOCO_EMULATE
  static_cast<void>(stream);
  return emu::run([&] { kernel(static_cast<Parameters>(arguments)...); }, grid, block, shared_bytes,
                  (size_t{0} + ... + sizeof(Parameters)));
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
#endif
}

}  // namespace moco_ext::cuda
