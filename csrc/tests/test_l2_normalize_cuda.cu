// l2_normalize against a float64 loop.
#include "check.h"
#include "kernels/cuda.h"

namespace {

using check::Device;
using check::Random;
using moco_ext::cuda::l2_normalize;

template <typename T>
void run(const std::vector<T>& x, int64_t rows, int64_t cols, float eps, bool with_norm, size_t offset,
         size_t out_offset) {
  char what[120];
  snprintf(what, sizeof what, "[%lld, %lld] eps %g norm %d offsets %zu %zu", static_cast<long long>(rows),
           static_cast<long long>(cols), static_cast<double>(eps), with_norm, offset, out_offset);
  const Device<T> in(x, offset), out(std::vector<T>(x.size()), out_offset);
  const Device<float> norm(std::vector<float>(static_cast<size_t>(rows), -1.0f));
  check::cuda(l2_normalize(in.data(), out.data(), with_norm ? norm.data() : nullptr, rows, cols, eps, nullptr));
  const auto got = out.host();
  const auto got_norm = norm.host();
  bool good = true;
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < cols; ++j) {
      const double v = check::value(x[static_cast<size_t>(i * cols + j)]);
      sum += v * v;
    }
    const double root = std::sqrt(sum), want_norm = root < eps ? eps : root;
    for (int64_t j = 0; j < cols; ++j) {
      const auto at = static_cast<size_t>(i * cols + j);
      const double want = check::value(x[at]) / want_norm;
      good &= check::close(got[at], want, std::abs(want));
    }
    const float n = got_norm[static_cast<size_t>(i)];
    good &= with_norm ? check::close(n, want_norm, want_norm) : n == -1.0f;
  }
  check::that(good, what);
}

template <typename T>
void test_shapes(Random& random) {
  check::group(std::string(check::name<T>()) + ": shapes and alignments");
  for (const int64_t cols :
       {1, 2, 3, 4, 7, 8, 31, 64, 127, 128, 129, 256, 264, 512, 1000, 1025, 2048, 2049, 2056, 5000, 9001}) {
    for (const int64_t rows : {0, 1, 8, 13}) {
      const auto x = check::normal<T>(random, static_cast<size_t>(rows * cols));
      run(x, rows, cols, 1e-12f, rows % 2 == 0, 0, 0);
      run(x, rows, cols, 1e-12f, rows % 2 == 1, 1, rows == 8 ? 0 : 1);
      run(x, rows, cols, 1e-12f, true, 0, 1);
    }
  }
  run(check::normal<T>(random, 3000 * 4), 3000, 4, 1e-12f, true, 0, 0);
}

void test_norms(Random& random) {
  check::group("norms: zero, tiny, huge; eps");
  for (const int64_t cols : {1, 3, 128, 700, 4096}) {
    for (const double scale : {0.0, 1e-30, 1e-15, 1e-10, 1e-4, 1e4, 1e18, 1e30, 1e36}) {
      const auto x = check::normal<float>(random, static_cast<size_t>(3 * cols), scale);
      run(x, 3, cols, 1e-12f, true, 0, 0);
      run(x, 3, cols, 0.5f, true, 0, 0);
    }
    for (const double scale : {0.0, 1e-34, 1e-30, 1e-22, 1e-19, 1e-13, 1.0}) {  // eps below the norms
      const auto x = check::normal<float>(random, static_cast<size_t>(3 * cols), scale);
      run(x, 3, cols, 0.0f, true, 0, 0);
      run(x, 3, cols, 1e-37f, true, 0, 0);
    }
  }
  auto x = check::normal<float>(random, 3 * 128);
  x[130] = NAN;
  run(x, 3, 128, 1e-12f, true, 0, 0);
  x[130] = INFINITY;
  run(x, 3, 128, 1e-12f, true, 0, 0);
}

}  // namespace

int main() {
  Random random(3);
  test_shapes<float>(random);
  test_shapes<__nv_bfloat16>(random);
  test_shapes<__half>(random);
  test_norms(random);
  return check::finish();
}
