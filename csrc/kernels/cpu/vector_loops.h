// The loops that benefit from wide vectors. vector_loops.inc and what it includes are compiled once for every
// instruction set; the first call chooses the best one that the processor supports.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu.h"

namespace moco_ext::cpu {

template <typename A>
using count_t = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;  // the width of a lane

// The running softmax of a panel of `width` rows, one lane each.
template <typename A>
struct PanelSoftmax {
  const A* positive;  // [width]
  A* max;             // [width] of the scores so far; ignores NaN, which the sum propagates
  A* sum;             // [width] of exp2((score - max) * scale)
  count_t<A>* above;  // [width] scores strictly above the positive
  A* acc;             // [C, width] weighted sum of the keys, relative to max as well; or null
};

// Operations on a tile of keys. Rows are stored in panels [C, width], with width a multiple of kPanelStep, so that a
// vector holds one feature of several rows. C and the number of keys are arbitrary.
template <typename A>
struct TileLoops {
  // scores [keys, width] = tile [keys, C] @ panel [C, width]
  void (*scores)(const A* tile, const A* panel, A* scores, int64_t keys, int64_t c, int64_t width);
  // acc [C, width] += tile [keys, C]^T @ weights [keys, width]
  void (*accumulate)(const A* tile, const A* weights, A* acc, int64_t keys, int64_t c, int64_t width);
  // Updates max, sum, above and the scale of acc. With an acc, scores [keys, width] -> exp2((score - max) * scale), in
  // place.
  void (*softmax)(A* scores, int64_t keys, int64_t c, int64_t width, A scale, const PanelSoftmax<A>& rows);
  // scores [keys, width] -> weight * (exp2((score - shift) * scale) - minus); shift, minus, weight [keys]
  void (*weigh)(A* scores, int64_t keys, int64_t width, A scale, const A* shift, const A* minus, const A* weight);
  // found [width]: whether a row has a score that is not up to its threshold, of scores [keys, width]
  void (*any_above)(const A* scores, int64_t keys, int64_t width, const A* threshold, count_t<A>* found);
};

constexpr int64_t kPanelStep = 16;
constexpr int64_t kPanelWidth = 64;

// One view, [3, height, width], and what color_steps does to it.
struct ColorView {
  const uint8_t* in;
  uint8_t* out;
  int64_t height;
  int64_t width;
  const int64_t* steps;  // [count]
  int64_t count;
  const float* factors;  // [4]
  const float* kernel;   // [taps]
  int64_t taps;
  float* scratch;  // [3 * height * width + (height + taps) * width + width + taps]
};

struct VectorLoops {
  const char* name;
  void (*exp2)(float* x, int64_t n);  // in place, for x <= 0; for testing its error
  TileLoops<float> tile_float;
  TileLoops<double> tile_double;
  void (*bfloat16_to_float)(const bfloat16* x, float* out, int64_t n);
  void (*float16_to_float)(const float16* x, float* out, int64_t n);
  void (*float_to_bfloat16)(const float* x, bfloat16* out, int64_t n);
  void (*float_to_float16)(const float* x, float16* out, int64_t n);
  void (*colors)(const ColorView& view);
};

const VectorLoops& vector_loops();

template <typename A>
inline const TileLoops<A>& tile_loops() {
  if constexpr (std::is_same_v<A, double>) {
    return vector_loops().tile_double;
  } else {
    return vector_loops().tile_float;
  }
}

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
