// enqueue against a float64 loop: values, unchanged rows, pointer.
#include <algorithm>

#include "check.h"
#include "kernels/cuda.h"

namespace {

using check::Device;
using check::Random;
using moco_ext::cuda::enqueue;

struct Shape {
  int64_t k, b, c, ptr;
  int64_t first, rows;  // of the k rows, those that are here
  bool normalize;
  size_t key_offset, queue_offset;  // elements of misalignment

  std::string text() const {
    char out[200];
    snprintf(out, sizeof out, "K %lld B %lld C %lld ptr %lld rows %lld + %lld normalize %d offsets %zu %zu",
             static_cast<long long>(k), static_cast<long long>(b), static_cast<long long>(c),
             static_cast<long long>(ptr), static_cast<long long>(first), static_cast<long long>(rows), normalize,
             key_offset, queue_offset);
    return out;
  }
};

constexpr float kEps = 1e-12f;

template <typename Key>
double factor(const Key* row, int64_t c, bool normalize) {
  if (!normalize) return 1.0;
  double sum = 0;
  for (int64_t j = 0; j < c; ++j) sum += check::value(row[j]) * check::value(row[j]);
  const double norm = std::sqrt(sum);
  return 1.0 / (norm < kEps ? kEps : norm);
}

template <typename Key, typename Queue>
void run(const Shape& s, Random& random, const std::vector<Key>& keys) {
  const auto before = check::normal<Queue>(random, static_cast<size_t>(s.rows * s.c));
  const Device<Key> device_keys(keys, s.key_offset);
  const Device<Queue> queue(before, s.queue_offset);
  const Device<int64_t> ptr(std::vector<int64_t>{s.ptr});
  check::cuda(enqueue(queue.data(), ptr.data(), device_keys.data(), s.k, s.b, s.c, s.first, s.rows, s.normalize, kEps,
                      nullptr));

  std::vector<int64_t> source(static_cast<size_t>(s.k), -1);
  const int64_t start = (s.ptr % s.k + s.k) % s.k;
  for (int64_t i = 0; i < s.b; ++i) source[static_cast<size_t>((start + i) % s.k)] = i;
  const auto got = queue.host();
  bool good = true;
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t from = source[static_cast<size_t>(s.first + row)];
    const double scale = from < 0 ? 0 : factor(&keys[static_cast<size_t>(from * s.c)], s.c, s.normalize);
    for (int64_t j = 0; j < s.c; ++j) {
      const auto at = static_cast<size_t>(row * s.c + j);
      if (from < 0) {
        good &= check::value(got[at]) == check::value(before[at]);
      } else {
        const double want = check::value(keys[static_cast<size_t>(from * s.c + j)]) * scale;
        good &= check::close(got[at], want, std::abs(want));
      }
    }
  }
  check::that(good, "rows of " + s.text());
  const int64_t want = (start + s.b) % s.k;
  check::that(ptr.host()[0] == want, "pointer " + std::to_string(ptr.host()[0]) + " of " + s.text());
}

template <typename Key, typename Queue>
void test_shapes(Random& random, int draws) {
  check::group(std::string(check::name<Key>()) + " -> " + check::name<Queue>() + ": random shapes");
  constexpr int64_t kKs[] = {1, 2, 7, 64, 100, 130}, kBs[] = {0, 1, 5, 8, 9, 64, 100, 131, 300};
  constexpr int64_t kCs[] = {1, 3, 4, 8, 33, 64, 127, 128, 130, 256, 260, 512, 520, 1030, 1100, 2056};
  for (int i = 0; i < draws; ++i) {
    Shape s{};
    s.k = check::pick(random, kKs);
    s.b = check::pick(random, kBs);
    s.c = kCs[i % 16];  // every width, for any number of draws
    constexpr int64_t kLargest = (int64_t{1} << 39) - 1;
    s.ptr = i % 5 == 0 ? check::uniform(random, -7 * s.k, 7 * s.k) : check::uniform(random, 0, s.k - 1);
    if (i % 16 == 6) s.ptr = kLargest;
    if (i % 16 == 7) s.ptr = -kLargest - 1;
    s.first = i % 2 == 0 ? 0 : check::uniform(random, 0, s.k - 1);
    s.rows = i % 2 == 0 ? s.k : check::uniform(random, 1, s.k - s.first);
    s.normalize = i % 3 != 0;
    s.key_offset = i % 4 == 1 ? 1 : 0;
    s.queue_offset = i % 4 == 3 ? 1 : 0;
    run<Key, Queue>(s, random, check::normal<Key>(random, static_cast<size_t>(s.b * s.c)));
  }
}

template <typename Key>
void test_queues(Random& random, int draws) {
  test_shapes<Key, float>(random, draws);
  test_shapes<Key, __nv_bfloat16>(random, draws);
  test_shapes<Key, __half>(random, draws);
}

void test_norms(Random& random) {
  check::group("norms: zero, tiny, huge");
  for (const int64_t c : {1, 64, 128, 130, 1100}) {
    const Shape s{16, 8, c, 3, 0, 16, true, 0, 0};
    std::vector<float> keys;
    for (const double scale : {0.0, 1e-30, 1e-15, 1e-4, 1e4, 1e18, 1e30, 1e36}) {
      const auto row = check::normal<float>(random, static_cast<size_t>(c), scale);
      keys.insert(keys.end(), row.begin(), row.end());
    }
    run<float, float>(s, random, keys);
  }
  check::group("a row with a NaN");
  auto keys = check::normal<float>(random, 2 * 128);
  keys[5] = NAN;
  const Device<float> device_keys(keys), queue(std::vector<float>(4 * 128));
  const Device<int64_t> ptr(std::vector<int64_t>{0});
  check::cuda(enqueue(queue.data(), ptr.data(), device_keys.data(), 4, 2, 128, 0, 4, true, kEps, nullptr));
  const auto got = queue.host();
  check::that(std::all_of(got.begin(), got.begin() + 128, [](float x) { return std::isnan(x); }), "all of it is NaN");
  check::that(std::none_of(got.begin() + 128, got.end(), [](float x) { return std::isnan(x); }), "no other row is");
}

void test_many_blocks(Random& random) {
  check::group("more rows than the grid takes at once");
  for (const int64_t b : {20000, 41000}) {
    const Shape s{35001, b, 4, 34000, 0, 35001, true, 0, 0};
    run<float, __nv_bfloat16>(s, random, check::normal<float>(random, static_cast<size_t>(s.b * s.c)));
  }
}

void test_sequence(Random& random) {
  check::group("a hundred batches");
  constexpr int64_t kRows = 50, kCols = 8;
  std::vector<float> model(kRows * kCols);
  const Device<float> queue(model);
  const Device<int64_t> ptr(std::vector<int64_t>{0});
  int64_t at = 0;
  for (int step = 0; step < 100; ++step) {
    const int64_t b = check::uniform(random, 0, 70);
    const auto keys = check::normal<float>(random, static_cast<size_t>(b * kCols));
    const Device<float> device_keys(keys);
    check::cuda(enqueue(queue.data(), ptr.data(), device_keys.data(), kRows, b, kCols, 0, kRows, false, kEps, nullptr));
    for (int64_t i = 0; i < b; ++i) {
      std::copy_n(&keys[static_cast<size_t>(i * kCols)], kCols, &model[static_cast<size_t>((at + i) % kRows * kCols)]);
    }
    at = (at + b) % kRows;
    check::that(queue.host() == model && ptr.host()[0] == at, "step " + std::to_string(step));
  }
}

void test_arguments() {
  check::group("arguments");
  check::that(enqueue<float, float>(nullptr, nullptr, nullptr, 0, 1, 1, 0, 0, false, kEps, nullptr) != cudaSuccess,
              "K = 0");
  check::that(enqueue<float, float>(nullptr, nullptr, nullptr, int64_t{1} << 39, 1, 1, 0, 1, false, kEps, nullptr) !=
                  cudaSuccess,
              "K = 2^39");
}

}  // namespace

int main() {
  Random random(2);
  constexpr int kDraws = 48;
  test_queues<float>(random, kDraws);
  test_queues<__nv_bfloat16>(random, kDraws);
  test_queues<__half>(random, kDraws);
  test_norms(random);
  test_many_blocks(random);
  test_sequence(random);
  test_arguments();
  return check::finish();
}
