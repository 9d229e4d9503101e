// info_nce on CUDA with a reduction: against the rows' own results, summed here in float64.
//
// One source for the device (nvcc) and for the host emulator (MOCO_EMULATE). The workspace starts as all bits set, so
// the count of finished blocks must be reset by the operator. Runs twice in the same workspace must agree to the bit.
#include "check.h"
#include "kernels/cuda.h"
#include "kernels/cuda/info_nce_combine.cuh"

namespace {

namespace cuda = moco_ext::cuda;
using check::Device;

struct Case {
  int64_t n, k, c;
  bool gradient, in_batch;
};

struct Results {
  std::vector<float> loss, reduced, grad_query, grad_key, grad_temperature;
  bool operator==(const Results&) const = default;  // no NaN but in `reduced` of no rows
};

template <typename Query, typename Queue>
Results run(const Case& x, cuda::Reduction reduction, const Device<Query>& query, const Device<Query>& key,
            const Device<Queue>& queue, const Device<char>* workspace = nullptr) {
  const bool none = reduction == cuda::Reduction::kNone;
  const auto floats = [](int64_t n) { return Device<float>(std::vector<float>(n, NAN)); };
  const auto loss = floats(x.n), lse = floats(x.n), positive = floats(x.n), grad_query = floats(x.n * x.c);
  const auto grad_key = floats(x.n * x.c), weights = floats(3 * x.n);
  const auto reduced = floats(none ? x.n : 1), grad_temperature = floats(none ? x.n : 1);
  const Device<int64_t> rank(std::vector<int64_t>(x.n, -7));
  const cuda::InfoNceOptions options{0.1f, nullptr, 1e-12f, true, 3};
  cuda::InfoNceContrast contrast{};
  contrast.in_batch = x.in_batch;
  contrast.keys = x.n;
  const cuda::InfoNceShape shape{x.n, x.k, x.c};
  const cuda::InfoNceOutputs outputs{loss.data(),
                                     lse.data(),
                                     positive.data(),
                                     rank.data(),
                                     x.gradient ? grad_query.data() : nullptr,
                                     x.gradient && !x.in_batch ? grad_key.data() : nullptr,
                                     x.gradient ? grad_temperature.data() : nullptr,
                                     x.gradient && x.in_batch ? weights.data() : nullptr,
                                     reduced.data(),
                                     reduction};
  const Device<char> fresh(std::vector<char>(
      cuda::info_nce_workspace_bytes(queue.data(), shape, options, contrast, x.gradient), char(0xff)));
  check::cuda(cuda::info_nce(query.data(), key.data(), queue.data(), nullptr, shape, options, contrast, outputs,
                             (workspace == nullptr ? fresh : *workspace).data(), cudaStream_t{}));
  Results results{loss.host(), reduced.host(), {}, {}, {}};
  if (x.gradient) results.grad_query = grad_query.host();
  if (x.gradient && !x.in_batch) results.grad_key = grad_key.host();
  if (x.gradient) results.grad_temperature = grad_temperature.host();
  return results;
}

double sum(const std::vector<float>& rows) {
  double total = 0;
  for (const float row : rows) total += row;
  return total;
}

template <typename Query, typename Queue>
void test(const Case& x, check::Random& random) {
  const Device<Query> query(check::normal<Query>(random, x.n * x.c)), key(check::normal<Query>(random, x.n * x.c));
  const Device<Queue> queue(check::normal<Queue>(random, x.k * x.c, 1 / std::sqrt(double(x.c))));
  const std::string what = std::string(check::name<Query>()) + " " + check::name<Queue>() + " N " +
                           std::to_string(x.n) + " C " + std::to_string(x.c) + (x.gradient ? "" : " without gradient") +
                           (x.in_batch ? " in batch" : "");
  const Results rows = run(x, cuda::Reduction::kNone, query, key, queue);
  check::that(rows.reduced == rows.loss, what + ": a copy of the losses");
  for (const auto reduction : {cuda::Reduction::kMean, cuda::Reduction::kSum}) {
    const bool mean = reduction == cuda::Reduction::kMean;
    const double weight = mean ? 1.0 / double(x.n) : 1.0;
    const Device<char> workspace(std::vector<char>(size_t{1} << 21, char(0xff)));
    const Results got = run(x, reduction, query, key, queue, &workspace);
    check::that(got == run(x, reduction, query, key, queue, &workspace), what + ": the same bits again");
    check::that(got.loss == rows.loss, what + ": the rows' losses");
    // Sums of float32: their rounding errors are far below those of float32 sums in any order, N 2^-24.
    const auto hold = [&](const std::vector<float>& value, const std::vector<float>& of, double factor,
                          const char* name) {
      double size = 0;
      for (const float row : of) size += std::abs(row);
      check::that(std::abs(value[0] - factor * sum(of)) <= 1e-6 * factor * size, what + ": " + name);
    };
    hold(got.reduced, rows.loss, weight, mean ? "mean" : "sum");
    if (!x.gradient) continue;
    hold(got.grad_temperature, rows.grad_temperature, weight, "grad_temperature");
    const auto equal = [&](const std::vector<float>& a, const std::vector<float>& b, const char* name) {
      bool good = a.size() == b.size();
      for (size_t i = 0; good && i < a.size(); ++i)
        good = std::abs(a[i] - weight * b[i]) <= 3e-7 * weight * std::abs(b[i]);
      check::that(good, what + ": " + name);
    };
    equal(got.grad_query, rows.grad_query, "grad_query");
    equal(got.grad_key, rows.grad_key, "grad_key");
  }
}

// Every split and column has a thread, within the limits of a block.
void test_combine_shape() {
  bool good = true;
  for (const int64_t n : {1, 255, 256, 511, 4096, 100000}) {
    for (const int64_t c : {0, 1, 128, 129, 256, 768, 1024, 1025, 5000}) {
      for (int64_t splits = 0; splits < 300; ++splits) {
        const cuda::CombineShape shape = cuda::combine_shape(n, c, splits);
        good &= shape.rows >= 1 && shape.rows <= 8 && shape.warps() >= 1 && shape.warps() <= cuda::kCombineWarps;
        good &= shape.group_splits * shape.split_groups >= splits && shape.span() >= std::min<int64_t>(c, 1024);
        good &= splits == 0 || shape.group_splits * (shape.split_groups - 1) < splits;  // no empty group
      }
    }
  }
  check::that(good, "shapes");
}

void test_no_rows() {
  const Device<float> rows(std::vector<float>(64)), queue(std::vector<float>(64));
  const Case x{0, 1, 64, true, false};
  const Results mean = run(x, cuda::Reduction::kMean, rows, rows, queue);
  check::that(std::isnan(mean.reduced[0]) && mean.grad_temperature[0] == 0, "mean");
  const Results total = run(x, cuda::Reduction::kSum, rows, rows, queue);
  check::that(total.reduced[0] == 0 && total.grad_temperature[0] == 0, "sum");
}

}  // namespace

int main(int argc, char** argv) {
  check::Random random(argc > 2 ? atoi(argv[2]) : 20191113);
  check::group("mean and sum of the rows");
  for (const bool in_batch : {false, true}) {
    for (const int64_t c : {64, 17}) {
      for (const int64_t n : {1, 6}) test<float, float>({n, 70, c, true, in_batch}, random);
    }
    test<float, float>({6, 70, 64, false, in_batch}, random);
  }
  test<float, float>({300, 64, 64, true, false}, random);   // more rows than threads of a block
  test<float, float>({1537, 20, 17, true, false}, random);  // several rows per block
  test<float, float>({600, 300, 64, false, false}, random);
  test<__nv_bfloat16, float>({20, 100, 128, true, false}, random);
  test<__half, __nv_bfloat16>({20, 100, 128, true, false}, random);
  test<float, __half>({20, 100, 128, true, true}, random);
  check::group("shape of combine's blocks");
  test_combine_shape();
  check::group("no rows");
  test_no_rows();
  return check::finish();
}
