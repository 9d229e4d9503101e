// Launching a kernel, on the device or (MOCO_EMULATE) in the host emulator of csrc/tests/emulator.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
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

// Programmatic dependent launch (sm_90 and newer): a kernel launched with Start::kEarly may start as soon as every
// block of the previous kernel in the stream has called let_next_kernel_start or ended. So each of its blocks must call
// wait_for_previous_kernel before it reads what that kernel writes, and before it writes to device memory, which that
// kernel may still read. As the previous kernel has waited for its own predecessor, all earlier kernels have ended by
// then. In a kernel that was launched normally, the wait does nothing.
enum class Start { kAfterPrevious, kEarly };

__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#ifndef MOCO_EMULATE
// Whether this library's code for the current device has the two instructions. A newer device may run older PTX.
inline bool can_start_early(const void* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<int> cache[kDevices];  // 0: unknown
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int version = cache[device].load(std::memory_order_relaxed);
  if (version == 0) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
    version = attributes.ptxVersion;
    cache[device].store(version, std::memory_order_relaxed);
  }
  return version >= 90;
}
#endif

template <typename... Parameters, typename... Arguments>
cudaError_t launch(Start start, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (const cudaError_t error = allow_dynamic_shared(kernel, shared_bytes); error != cudaSuccess) return error;
#ifdef MOCO_EMULATE
  static_cast<void>(start);
  static_cast<void>(stream);
  return emu::run([&] { kernel(static_cast<Parameters>(arguments)...); }, grid, block, shared_bytes,
                  (size_t{0} + ... + sizeof(Parameters)));
#else
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = start == Start::kEarly && can_start_early(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  return launch(Start::kAfterPrevious, kernel, grid, block, shared_bytes, stream,
                std::forward<Arguments>(arguments)...);
}

}  // namespace moco_ext::cuda
