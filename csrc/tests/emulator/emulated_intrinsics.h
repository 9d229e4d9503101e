// Device functions that need no scheduler: atomics, cached loads, fast math, bit casts. Part of emulator.h.
#pragma once

#include <math.h>  // isinf and others without std::, as in device code

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

// Fibers switch only at collectives, so plain arithmetic is atomic. Types as in CUDA: no int64_t overloads.
template <typename T>
inline T emulated_fetch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
#define MOCO_EMULATE_ATOMICS(T)                                                                                 \
  inline T atomicAdd(T* address, T value) { return emulated_fetch(address, static_cast<T>(*address + value)); } \
  inline T atomicExch(T* address, T value) { return emulated_fetch(address, value); }
MOCO_EMULATE_ATOMICS(int)
MOCO_EMULATE_ATOMICS(unsigned)
MOCO_EMULATE_ATOMICS(unsigned long long)  // NOLINT: CUDA's spelling
MOCO_EMULATE_ATOMICS(float)
#undef MOCO_EMULATE_ATOMICS
#define MOCO_EMULATE_ATOMICS(T)                                                                          \
  inline T atomicMax(T* address, T value) { return emulated_fetch(address, std::max(*address, value)); } \
  inline T atomicMin(T* address, T value) { return emulated_fetch(address, std::min(*address, value)); } \
  inline T atomicCAS(T* address, T expected, T value) {                                                  \
    return emulated_fetch(address, *address == expected ? value : *address);                             \
  }
MOCO_EMULATE_ATOMICS(int)
MOCO_EMULATE_ATOMICS(unsigned)
MOCO_EMULATE_ATOMICS(unsigned long long)  // NOLINT: CUDA's spelling
#undef MOCO_EMULATE_ATOMICS

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}
template <typename T>
inline T __ldca(const T* address) {
  return *address;
}
template <typename T>
inline T __ldcg(const T* address) {
  return *address;
}
template <typename T>
inline T __ldcs(const T* address) {
  return *address;
}
template <typename T>
inline T __ldcv(const T* address) {
  return *address;
}
template <typename T>
inline T __ldlu(const T* address) {
  return *address;
}
template <typename T>
inline void __stcg(T* address, T value) {
  *address = value;
}
template <typename T>
inline void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
inline void __stwt(T* address, T value) {
  *address = value;
}

#define MOCO_EMULATE_MIN_MAX(T)                    \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
MOCO_EMULATE_MIN_MAX(int)
MOCO_EMULATE_MIN_MAX(unsigned)
MOCO_EMULATE_MIN_MAX(long)
MOCO_EMULATE_MIN_MAX(unsigned long)
MOCO_EMULATE_MIN_MAX(long long)           // NOLINT: CUDA's spelling
MOCO_EMULATE_MIN_MAX(unsigned long long)  // NOLINT: CUDA's spelling
#undef MOCO_EMULATE_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline float emulated_rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#define rsqrtf emulated_rsqrtf  // declared by C23 libraries

inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
