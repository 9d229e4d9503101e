// The vector loops of the CPU for every instruction set that this processor has: exp2 against double over its whole
// range, the products and the softmax of a tile against plain loops, for all widths and odd sizes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#ifdef MOCO_X86
#include <xmmintrin.h>
#endif

#include "kernels/cpu.h"
#include "kernels/cpu/vector_loops.h"

namespace moco_ext::cpu {
extern const VectorLoops vector_loops_baseline;
#ifdef MOCO_X86
extern const VectorLoops vector_loops_avx2;
extern const VectorLoops vector_loops_avx512;
bool supports_avx2();
#endif
}  // namespace moco_ext::cpu

namespace {

using namespace moco_ext::cpu;  // NOLINT

int failures = 0;

void expect(bool good, const char* set, const char* what, double error, double bound) {
  if (!good) ++failures;
  std::printf("%-9s %-28s error %.2e, bound %.2e%s\n", set, what, error, bound, good ? "" : "  FAILED");
}

void test_exp2(const VectorLoops& loops) {
  constexpr double kBound = 1.2e-7;
  double worst = 0;
  std::vector<float> x;
  for (float v = 0.0f; v >= -126.0f; v = std::nextafter(v - 3e-6f * (1 - v), -1000.0f)) x.push_back(v);
  std::vector<float> y = x;
  loops.exp2(y.data(), static_cast<int64_t>(y.size()));
  for (size_t i = 0; i < x.size(); ++i) worst = std::max(worst, std::abs(y[i] / std::exp2(double{x[i]}) - 1));
  char what[64];
  std::snprintf(what, sizeof what, "exp2 at %zu points", x.size());
  expect(worst <= kBound, loops.name, what, worst, kBound);
  float edges[] = {-126.5f, -1e30f, -std::numeric_limits<float>::infinity(), NAN, 0.0f};
  loops.exp2(edges, 5);
  const bool good = edges[0] == 0 && edges[1] == 0 && edges[2] == 0 && std::isnan(edges[3]) && edges[4] == 1;
  expect(good, loops.name, "exp2 beyond its range", !good, 0);
}

template <typename A>
void test_tile(const TileLoops<A>& loops, int64_t keys, int64_t c, int64_t width, double& worst) {
  std::mt19937 random(static_cast<unsigned>(keys * 10007 + c * 101 + width));
  std::normal_distribution<double> normal;
  const auto make = [&](int64_t n) {
    std::vector<A> v(n);
    for (A& x : v) x = static_cast<A>(normal(random));
    return v;
  };
  const std::vector<A> tile = make(keys * c), panel = make(c * width), positive = make(width), before = make(c * width);
  std::vector<A> scores(keys * width, NAN), acc = before;
  std::vector<A> max = positive, sum(width, A{1});
  std::vector<count_t<A>> above(width, 3);
  const A scale = A{0.5};

  loops.scores(tile.data(), panel.data(), scores.data(), keys, c, width);
  std::vector<double> exact(keys * width);
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t f = 0; f < c; ++f) exact[j * width + i] += double{tile[j * c + f]} * panel[f * width + i];
      worst = std::max(worst, std::abs(scores[j * width + i] - exact[j * width + i]) / std::sqrt(c));
    }
  }

  const std::vector<A> raw = scores;
  loops.softmax(scores.data(), keys, c, width, scale,
                {positive.data(), max.data(), sum.data(), above.data(), acc.data()});
  std::vector<double> want_acc(c * width);
  for (int64_t i = 0; i < width; ++i) {
    double top = positive[i];
    int64_t count = 3;
    for (int64_t j = 0; j < keys; ++j) {
      top = std::max(top, double{raw[j * width + i]});
      count += raw[j * width + i] > positive[i];
    }
    const double shrink = std::exp2((positive[i] - top) * scale);
    double total = shrink;
    for (int64_t f = 0; f < c; ++f) want_acc[f * width + i] = before[f * width + i] * shrink;
    for (int64_t j = 0; j < keys; ++j) {
      const double p = std::exp2((raw[j * width + i] - top) * scale);
      total += p;
      worst = std::max(worst, std::abs(scores[j * width + i] - p));
      for (int64_t f = 0; f < c; ++f) want_acc[f * width + i] += p * tile[j * c + f];
    }
    worst = std::max(worst, std::abs(sum[i] - total) / total);
    if (above[i] != count || max[i] != static_cast<A>(top)) worst = INFINITY;
  }
  loops.accumulate(tile.data(), scores.data(), acc.data(), keys, c, width);
  for (int64_t e = 0; e < c * width; ++e) worst = std::max(worst, std::abs(acc[e] - want_acc[e]) / std::sqrt(keys));

  scores = raw;
  const std::vector<A> minus = make(keys), weight = make(keys);
  std::vector<A> shift(keys);
  for (int64_t j = 0; j < keys; ++j) shift[j] = *std::max_element(&raw[j * width], &raw[j * width] + width);
  loops.weigh(scores.data(), keys, width, scale, shift.data(), minus.data(), weight.data());
  for (int64_t e = 0; e < keys * width; ++e) {
    const int64_t j = e / width;
    const double want = weight[j] * (std::exp2((double{raw[e]} - shift[j]) * scale) - minus[j]);
    worst = std::max(worst, std::abs(scores[e] - want));
  }
}

template <typename A>
void test_tiles(const VectorLoops& set, const TileLoops<A>& loops, const char* what, double bound) {
  double worst = 0;
  for (int64_t width = kPanelStep; width <= kPanelWidth; width += kPanelStep) {
    for (const int64_t keys : {1, 5, 64, 67}) {
      for (const int64_t c : {1, 3, 29, 128}) test_tile(loops, keys, c, width, worst);
    }
  }
  expect(worst <= bound, set.name, what, worst, bound);
}

void test(const VectorLoops& loops) {
  test_exp2(loops);
  test_tiles(loops, loops.tile_float, "tiles of float32", 3e-6);  // 50 roundings of products of size up to 10
  test_tiles(loops, loops.tile_double, "tiles of float64", 1e-14);
}

#ifdef MOCO_X86
// Large unnormalized logits make weights of every size down to 0. Arithmetic on the subnormal ones among them is over a
// hundred times slower on many processors, which set a flag when they meet one.
void test_subnormals() {
  constexpr int64_t kN = 40, kKeys = 300, kC = 32;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> query(kN * kC), keys(kKeys * kC), loss(kN), lse(kN), positive(kN), upstream(kN, 1);
  std::vector<float> grad_query(kN * kC), grad_key(kKeys * kC), weights(3 * kN);
  std::vector<int64_t> rank(kN);
  for (float& x : query) x = 4 * normal(random);
  for (float& x : keys) x = normal(random);
  const Host host{1, [](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) { body(0, n); }};
  const InfoNceShape shape{kN, 0, kC};
  const InfoNceOptions options{1.0, 1e-12, false};
  const InfoNceContrast contrast{.in_batch = true, .keys = kKeys};
  constexpr unsigned kDenormalOperand = 2;
  _mm_setcsr(_mm_getcsr() & ~kDenormalOperand);
  info_nce<float, float>(
      host, query.data(), keys.data(), nullptr, nullptr, shape, options, contrast,
      {loss.data(), lse.data(), positive.data(), rank.data(), grad_query.data(), nullptr, nullptr, weights.data()});
  expect((_mm_getcsr() & kDenormalOperand) == 0, instruction_set(), "no subnormals forward", 0, 0);
  _mm_setcsr(_mm_getcsr() & ~kDenormalOperand);
  info_nce_keys_backward(host, query.data(), keys.data(), shape, options, contrast, lse.data(), weights.data(),
                         upstream.data(), grad_key.data());
  expect((_mm_getcsr() & kDenormalOperand) == 0, instruction_set(), "no subnormals backward", 0, 0);
  volatile float tiny = 0x1p-126f;
  expect(tiny * 0.5f > 0, instruction_set(), "subnormals for the caller", 0, 0);
}
#endif

}  // namespace

int main() {
  test(vector_loops_baseline);
#ifdef MOCO_X86
  if (supports_avx2()) test(vector_loops_avx2);
  if (std::strcmp(vector_loops().name, "avx512") == 0) test(vector_loops_avx512);
  test_subnormals();
#endif
  std::printf(failures == 0 ? "all passed\n" : "%d FAILED\n", failures);
  return failures != 0;
}
