// Operations on one row of features: loading, normalization and its gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/vector_loops.h"

namespace moco_ext::cpu {

// Eight independent sums, so that additions do not wait for each other.
template <typename A>
inline double double_dot(const A* x, const A* y, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += static_cast<double>(x[i + l]) * static_cast<double>(y[i + l]);
  }
  for (; i < n; ++i) lanes[0] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

template <typename A>
inline A dot(const A* x, const A* y, int64_t n) {
  // In double, norms and scores of positives are exact to the last bit of the accumulation type, and huge float32 rows
  // do not overflow.
  return static_cast<A>(double_dot(x, y, n));
}

// out = x, or x / max(||x||, eps) if normalize; returns the divisor.
template <typename T, typename A>
inline A load_row(const T* x, A* out, int64_t n, bool normalize, A eps) {
  convert_array(x, out, n);
  if (!normalize) return A{1};
  const double length = std::sqrt(double_dot(out, out, n));
  const double norm = length < static_cast<double>(eps) ? static_cast<double>(eps) : length;  // NaN stays NaN
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(static_cast<double>(out[i]) / norm);
  return static_cast<A>(norm);
}

// Gradient with respect to the unit row -> gradient with respect to the row, in place. A norm below eps is a constant.
template <typename A>
inline void normalize_backward(const A* unit, A norm, A eps, A* gradient, int64_t n) {
  const A along = norm > eps ? dot(unit, gradient, n) : A{0};
  for (int64_t i = 0; i < n; ++i) gradient[i] = (gradient[i] - along * unit[i]) / norm;
}

}  // namespace moco_ext::cpu
