// Runs CUDA kernel source on the host, so that its logic is tested before (and without) a GPU.
//
// The kernel's .cu is compiled as ordinary C++ with -DMOCO_EMULATE and linked with this folder:
//
//   g++ -std=c++20 -O1 -g -fno-strict-aliasing -Wno-unknown-pragmas -DMOCO_EMULATE -x c++
//       -I csrc/tests/emulator -I csrc -I csrc/tests -I $CUDA/include test_x.cu x.cu csrc/tests/emulator/*.cpp
//
// (-fsanitize=undefined works too, and also detects misaligned vector accesses and violated bounds of static arrays.)
//
// Blocks run one after the other. The threads of a block are fibers of one OS thread, switched only where they wait for
// each other: __syncthreads, __syncwarp, shuffles, votes, warp_exchange. Detected, with a message that names block,
// thread and source line, then abort():
//   - threads of a block waiting at different barriers, or some of them exited: divergence, deadlock;
//   - a warp collective whose mask includes an exited lane, or that only some of the lanes in its mask reach;
//   - out-of-bounds accesses of dynamic shared memory and global allocations (guard bytes before them detect writes, an
//     unmapped page after them reads too), stack overflow;
//   - cp.async that is misaligned or writes outside shared memory; misuse of Hopper's instructions (emulated_sm90.h).
// Not detected, but turned into wrong results:
//   - uninitialized memory: shared memory is 0xFF (NaN) before each block, global memory after each cudaMalloc;
//   - missing barriers: run with several seeds (MOCO_EMULATE_SEED). 0 runs fibers in order, 1 in reverse order, others
//     run fibers and blocks in random order; with even ones, a random warp or warpgroup of each block runs mostly when
//     all others wait. Results must not change;
//   - a missing cp.async wait: the destination becomes NaN when the copy is issued, and is filled when the issuing
//     thread waits. This shows early reads as well as copies into a buffer that is still being read.
//
// Not modeled: memory ordering (fences do nothing; a plain access is visible at once), races between blocks, spinning
// on another block or thread (hangs), lock-step execution without a collective, bank conflicts, occupancy, inline PTX
// (each PTX wrapper needs a branch for MOCO_EMULATE built on warp_exchange / cp_async), clusters,
// streams (everything is synchronous), rounding differences of fast intrinsics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <type_traits>

// The toolkit's headers define these as empty for a host compiler. Static shared variables are thread-local because
// that storage is one contiguous range, which can be poisoned.
#undef __shared__
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define __CUDA_ARCH_FEAT_SM90_ALL  // the emulated device has compute capability 9.0

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emu {

using Where = std::source_location;

struct Config {
  uint64_t seed;            // of the schedule; initially MOCO_EMULATE_SEED, or 0
  int multiprocessors = 4;  // as reported by cudaDeviceGetAttribute
  int blocks_per_multiprocessor = 2;
  size_t max_dynamic_shared = 232448;  // bytes
};
Config& config();

// Everything below `run` is for use inside a kernel.
cudaError_t run(const std::function<void()>& thread_body, dim3 grid, dim3 block, size_t shared_bytes,
                size_t parameter_bytes);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned char* dynamic_shared();

// Named barrier `id` (0..15) for `threads` threads of the block; 0 threads: all of them (__syncthreads).
void barrier(int id = 0, int threads = 0, Where where = Where::current());
// Such a barrier, which tells whether x is true for any of the threads.
bool any_at_barrier(bool x, int id = 0, int threads = 0, Where where = Where::current());

// Every lane in `mask` contributes `bytes` bytes, and gets the contributions of all 32 lanes, `bytes` apart (undefined
// for lanes outside the mask). The result is valid until the lane's next exchange.
const void* exchange_bytes(const void* mine, size_t bytes, unsigned mask, Where where);

template <typename T>
const T* warp_exchange(const T& mine, unsigned mask = 0xffffffffu, Where where = Where::current()) {
  static_assert(std::is_trivially_copyable_v<T>);
  return static_cast<const T*>(exchange_bytes(&mine, sizeof(T), mask, where));
}

int lane();

// cp.async of `size` (4, 8 or 16) bytes, of which all but the first `bytes_valid` are zero-filled and not read.
void cp_async(void* shared, const void* global, int bytes_valid, int size, Where where = Where::current());
void cp_async_commit();
void cp_async_wait(int groups_left);
template <int groups_left>
void cp_async_wait() {
  cp_async_wait(groups_left);
}
void cp_async_wait_all();  // including uncommitted copies

template <typename T>
T shuffle(unsigned mask, const T& value, int source, int width, bool in_range, Where where) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("shuffle of width %d (%s:%u)", width, where.file_name(), where.line());
  const T* all = warp_exchange(value, mask, where);
  if (!in_range) return value;
  if (!(mask >> source & 1))
    fail("shuffle reads lane %d, outside its mask (%s:%u)", source, where.file_name(), where.line());
  return all[source];
}

}  // namespace emu

inline void __syncthreads(emu::Where where = emu::Where::current()) { emu::barrier(0, 0, where); }
inline int __syncthreads_or(int predicate, emu::Where where = emu::Where::current()) {
  return emu::any_at_barrier(predicate != 0, 0, 0, where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emu::Where where = emu::Where::current()) {
  emu::exchange_bytes(nullptr, 0, mask, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emu::Where where = emu::Where::current()) {
  return emu::shuffle(mask, value, (emu::lane() & ~(width - 1)) + (source & (width - 1)), width, true, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, emu::Where where = emu::Where::current()) {
  const int source = emu::lane() ^ flip;  // may lie in an earlier segment, never in a later one
  return emu::shuffle(mask, value, source & 31, width, source < (emu::lane() & ~(width - 1)) + width, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, emu::Where where = emu::Where::current()) {
  const int source = emu::lane() + delta;
  return emu::shuffle(mask, value, source, width, source < (emu::lane() & ~(width - 1)) + width, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, emu::Where where = emu::Where::current()) {
  const int source = emu::lane() - delta;
  return emu::shuffle(mask, value, source, width, source >= (emu::lane() & ~(width - 1)), where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Where where = emu::Where::current()) {
  const int* all = emu::warp_exchange(predicate, mask, where);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (mask >> i & 1) && all[i] ? 1u << i : 0u;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, emu::Where where = emu::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emu::Where where = emu::Where::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}

#include "emulated_intrinsics.h"  // IWYU pragma: export
