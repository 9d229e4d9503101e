// The element loops that deserve wide vectors. vector_loops.inc is compiled once for every instruction set; the best
// one this processor runs is chosen once, at the first call.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/half.h"

namespace moco_ext::cpu {

struct RowMax {
  float max;      // NaN entries are passed over: the sum that follows carries them
  int64_t above;  // entries strictly above the threshold
};

struct VectorLoops {
  const char* name;
  // x [n]: its maximum, at least `floor`, and how many entries lie above `threshold`.
  RowMax (*max_and_count)(const float* x, int64_t n, float floor, float threshold);
  // x [n] -> exp2((x - shift) * scale), in place when `store`; returns the sum. Needs (x - shift) * scale <= 0.
  float (*exp2_and_sum)(float* x, int64_t n, float shift, float scale, bool store);
  void (*bfloat16_to_float)(const bfloat16* x, float* out, int64_t n);
  void (*float16_to_float)(const float16* x, float* out, int64_t n);
  void (*float_to_bfloat16)(const float* x, bfloat16* out, int64_t n);
  void (*float_to_float16)(const float* x, float16* out, int64_t n);
};

const VectorLoops& vector_loops();

// out [n] = x [n], converted.
inline void convert_array(const bfloat16* x, float* out, int64_t n) { vector_loops().bfloat16_to_float(x, out, n); }
inline void convert_array(const float16* x, float* out, int64_t n) { vector_loops().float16_to_float(x, out, n); }
inline void convert_array(const float* x, bfloat16* out, int64_t n) { vector_loops().float_to_bfloat16(x, out, n); }
inline void convert_array(const float* x, float16* out, int64_t n) { vector_loops().float_to_float16(x, out, n); }
template <typename T>
inline void convert_array(const T* x, T* out, int64_t n) {
  std::copy(x, x + n, out);
}

}  // namespace moco_ext::cpu
