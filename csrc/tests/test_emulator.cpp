// Tests of the emulator: correct kernels give correct results under every schedule, and each detector fires.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "dies.h"
#include "kernels/cuda/cuda_launch.cuh"

namespace {

using moco_ext::cuda::launch;

int passed = 0, failed = 0;

void check(const char* name, bool good) {
  ++(good ? passed : failed);
  if (!good) printf("FAILED: %s\n", name);
}

void check_dies(const char* name, const std::function<void()>& body, const char* message) {
  check(name, dies(body, message));
}

template <typename T>
struct Array {
  explicit Array(size_t n) { cudaMalloc(reinterpret_cast<void**>(&data), n * sizeof(T)); }
  ~Array() { cudaFree(data); }
  T* data = nullptr;
};

// Sums 0..blockDim-1 through shuffles and static shared memory; with a barrier between its phases, or without.
template <bool barrier>
__global__ void block_sum(int* out) {
  __shared__ int partial[32];
  int value = static_cast<int>(threadIdx.x);
  for (int flip = 16; flip > 0; flip /= 2) value += __shfl_xor_sync(0xffffffffu, value, flip);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  if constexpr (barrier) __syncthreads();
  int sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += partial[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <bool barrier>
bool block_sums_are_right() {
  Array<int> out(3 * 256);
  if (launch(block_sum<barrier>, 3, 256, 0, nullptr, out.data) != cudaSuccess) return false;
  for (int i = 0; i < 3 * 256; ++i) {
    if (out.data[i] != 255 * 128) return false;
  }
  return true;
}

// mode 0: correct; 1: no wait; 2: no barrier, so copies of other threads may not have completed
__global__ void reverse(const float4* in, float4* out, int n, int mode) {
  MOCO_DYNAMIC_SHARED(raw);
  float4* shared = reinterpret_cast<float4*>(raw);
  const int i = static_cast<int>(threadIdx.x);
  emu::cp_async(shared + i, in + i, i < n ? 16 : 0, 16);
  emu::cp_async_commit();
  if (mode != 1) emu::cp_async_wait<0>();
  if (mode != 2) __syncthreads();
  out[i] = shared[blockDim.x - 1 - threadIdx.x];
}

bool reverses(int mode) {
  Array<float4> in(40), out(64);
  for (int i = 0; i < 40; ++i) in.data[i] = make_float4(static_cast<float>(i), 1, 2, 3);
  launch(reverse, 1, 64, 64 * 16, nullptr, in.data, out.data, 40, mode);
  for (int i = 0; i < 64; ++i) {
    const int from = 63 - i;
    if (!(out.data[i].x == (from < 40 ? static_cast<float>(from) : 0.0f)) ||
        !(out.data[i].w == (from < 40 ? 3.0f : 0.0f)))
      return false;
  }
  return true;
}

// Two segments of 8 lanes and one of 16 exchange at different times, under their own masks.
__global__ void partial_masks(int* out) {
  const unsigned mask = threadIdx.x < 8 ? 0xffu : threadIdx.x < 16 ? 0xff00u : 0xffff0000u;
  int value = static_cast<int>(threadIdx.x);
  for (int flip = 4; flip > 0; flip /= 2) value += __shfl_xor_sync(mask, value, flip, 8);
  value += __shfl_sync(0xffffffffu, value, 31);
  out[threadIdx.x] = value + __shfl_down_sync(0xffffffffu, 0, 1) + (__ballot_sync(0xffffffffu, threadIdx.x == 3) != 8u);
}

bool partial_masks_are_right() {
  Array<int> out(32);
  launch(partial_masks, 1, 32, 0, nullptr, out.data);
  for (int i = 0; i < 32; ++i) {
    if (out.data[i] != (i / 8 * 8) * 8 + 28 + 24 * 8 + 28) return false;
  }
  return true;
}

__global__ void last_block_sums(int* count, int* values, int* sum) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    values[blockIdx.x] = static_cast<int>(blockIdx.x);
    __threadfence();
    last = atomicAdd(count, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    *sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) *sum += values[i];
  }
}

bool last_block_is_right() {
  Array<int> count(1), values(10), sum(1);
  *count.data = 0;
  launch(last_block_sums, 10, 64, 0, nullptr, count.data, values.data, sum.data);
  return *sum.data == 45;
}

__global__ void diverge(int mode, float* out) {
  MOCO_DYNAMIC_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  const int i = static_cast<int>(threadIdx.x);
  switch (mode) {
    case 0:  // some threads leave before the barrier
      if (i == 5) return;
      __syncthreads();
      break;
    case 1:  // two barriers
      if (i < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 2:  // one lane leaves before a shuffle
      if (i == 5) return;
      shared[i] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
      break;
    case 3:  // half a warp in a collective, the other half at a barrier
      if (i % 32 < 16) __syncwarp();
      __syncthreads();
      break;
    case 4:
      shared[64 + i] = 1;
      break;
    case 5:
      shared[-1] = 1;
      break;
    case 6:
      out[64] = 1;
      break;
    case 7:
      out[-1] = 1;
      break;
    case 8:
      out[0] = out[64];
      break;
    case 9:
      emu::cp_async(shared + 1, out, 16, 16);
      break;
    case 10:
      emu::cp_async(out, out, 16, 16);
      break;
    case 11:
      out[i] = shared[i];
      break;  // never written
    case 12:
      out[i] = __shfl_sync(0x1u << (i % 32), 1.0f, 31);
      break;
    default:
      break;
  }
}

void run_diverge(int mode) {
  Array<float> out(64);
  launch(diverge, 1, 64, 64 * sizeof(float), nullptr, mode, out.data);
}

__global__ void deep(int n, volatile int* out) {
  volatile char here[4096];
  here[n % 4096] = 1;
  if (n > 0) deep(n - 1, out);
  *out = *out + here[n % 4096];
}

}  // namespace

int main() {
  bool missing_barrier_shows = false, missing_copy_barrier_shows = false;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    emu::config().seed = seed;
    check("block sum", block_sums_are_right<true>());
    check("cp.async", reverses(0));
    check("partial masks", partial_masks_are_right());
    check("last block", last_block_is_right());
    check("a missing wait shows", !reverses(1));
    missing_barrier_shows |= !block_sums_are_right<false>();
    missing_copy_barrier_shows |= !reverses(2);
    check_dies("exit before a barrier", [] { run_diverge(0); }, "1 threads have exited");
    check_dies("two barriers", [] { run_diverge(1); }, "waits at the barrier");
    check_dies("exit before a shuffle", [] { run_diverge(2); }, "collective");
    check_dies("half a warp at a barrier", [] { run_diverge(3); }, "divergence");
  }
  emu::config().seed = 0;
  check("a missing barrier shows", missing_barrier_shows);
  check("a missing barrier after cp.async shows", missing_copy_barrier_shows);
  check_dies("write behind shared memory", [] { run_diverge(4); }, "into dynamic shared memory of 256 bytes");
  check_dies("write before shared memory", [] { run_diverge(5); }, "just outside its 256 bytes");
  check_dies("write behind an allocation", [] { run_diverge(6); }, "into an allocation of 256 bytes");
  check_dies("write before an allocation", [] { run_diverge(7); }, "just outside an allocation of 256 bytes");
  check_dies("read behind an allocation", [] { run_diverge(8); }, "into an allocation of 256 bytes");
  check_dies("misaligned cp.async", [] { run_diverge(9); }, "misaligned cp.async");
  check_dies("cp.async into global memory", [] { run_diverge(10); }, "outside shared memory");
  check_dies("shuffle from outside the mask", [] { run_diverge(12); }, "outside its mask");
  check_dies(
      "stack overflow",
      [] {
        Array<int> x(1);
        launch(deep, 1, 1, 0, nullptr, 100, x.data);
      },
      "below a thread's stack");
  {
    Array<float> out(64);
    launch(diverge, 1, 64, 256, nullptr, 11, out.data);
    check("uninitialized shared memory is NaN", std::isnan(out.data[0]) && std::isnan(out.data[63]));
    check("an empty grid is refused",
          launch(diverge, 0, 64, 0, nullptr, 99, out.data) == cudaErrorInvalidConfiguration);
    check("a huge block is refused", launch(diverge, 1, 2048, 0, nullptr, 99, out.data) != cudaSuccess);
    check("too much shared memory is refused", launch(diverge, 1, 64, 1 << 20, nullptr, 99, out.data) != cudaSuccess);
    check("the error is sticky once", cudaGetLastError() != cudaSuccess && cudaGetLastError() == cudaSuccess);
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
