// Shared by the CUDA kernel tests. They run on a GPU (nvcc) or in the emulator (g++ -DMOCO_EMULATE), print a line for
// each group of cases and "N passed, M failed" at the end, and return nonzero on failure.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#ifdef MOCO_EMULATE
#include "emulator.h"
#endif

namespace check {

struct State {
  std::string group;
  int passed = 0, failed = 0, group_passed = 0, group_failed = 0;
};
inline State state;

// Ends the previous group and begins a new one.
inline void group(const std::string& name) {
  if (!state.group.empty())
    printf("%-60s %6d passed, %d failed\n", state.group.c_str(), state.group_passed, state.group_failed);
  fflush(stdout);
  state.group = name;
  state.group_passed = state.group_failed = 0;
}

inline int finish() {
  group("");
  printf("%d passed, %d failed\n", state.passed, state.failed);
  return state.failed != 0;
}

inline void that(bool good, const std::string& what) {
  ++(good ? state.passed : state.failed);
  ++(good ? state.group_passed : state.group_failed);
  if (!good && state.group_failed <= 5) printf("FAILED %s: %s\n", state.group.c_str(), what.c_str());
}

inline void cuda(cudaError_t error, std::source_location where = std::source_location::current()) {
  if (error == cudaSuccess) return;
  printf("%s:%u: %s\n", where.file_name(), static_cast<unsigned>(where.line()), cudaGetErrorString(error));
  exit(2);
}

// Host copies of elements as double.
inline double value(float x) { return x; }
inline double value(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double value(__half x) { return __half2float(x); }

template <typename T>
T element(double x) {
  if constexpr (std::is_same_v<T, float>) return static_cast<float>(x);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(static_cast<float>(x));
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(static_cast<float>(x));
}

template <typename T>
const char* name() {
  return std::is_same_v<T, float> ? "float32" : std::is_same_v<T, __half> ? "float16" : "bfloat16";
}

// Half a unit in the last place of T; float16's subnormals are 2^-24 apart.
template <typename T>
double relative_tolerance() {
  return std::is_same_v<T, float> ? 1e-6 : std::is_same_v<T, __half> ? 0x1.02p-11 : 0x1.02p-8;
}
template <typename T>
double absolute_tolerance() {
  return std::is_same_v<T, __half> ? 0x1p-25 : 0x1p-148;
}

template <typename T>
bool close(T got, double want, double scale = 0.0) {
  if (std::isnan(want)) return std::isnan(value(got));
  if (std::isinf(want)) return value(got) == want;
  return std::abs(value(got) - want) <=
         relative_tolerance<T>() * std::abs(want) + 2e-6 * scale + absolute_tolerance<T>();
}

// Device memory of n elements that starts `offset` elements into an allocation, to misalign it.
template <typename T>
class Device {
 public:
  explicit Device(const std::vector<T>& host, size_t offset = 0) : size_(host.size()), offset_(offset) {
    cuda(cudaMalloc(reinterpret_cast<void**>(&base_), (size_ + offset_) * sizeof(T)));
    if (size_ != 0) cuda(cudaMemcpy(data(), host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(Device&& other) : base_(other.base_), size_(other.size_), offset_(other.offset_) { other.base_ = nullptr; }
  Device(const Device&) = delete;
  ~Device() { cudaFree(base_); }

  T* data() const { return base_ == nullptr ? nullptr : base_ + offset_; }
  std::vector<T> host() const {
    cuda(cudaDeviceSynchronize());
    std::vector<T> out(size_);
    if (size_ != 0) cuda(cudaMemcpy(out.data(), data(), size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  T* base_ = nullptr;
  size_t size_, offset_;
};

using Random = std::mt19937_64;

template <typename T>
std::vector<T> normal(Random& random, size_t n, double scale = 1.0) {
  std::normal_distribution<double> distribution(0.0, scale);
  std::vector<T> out(n);
  for (T& x : out) x = element<T>(distribution(random));
  return out;
}

inline int64_t uniform(Random& random, int64_t low, int64_t high) {  // both ends included
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

template <typename T, size_t n>
T pick(Random& random, const T (&from)[n]) {
  return from[uniform(random, 0, n - 1)];
}

}  // namespace check
