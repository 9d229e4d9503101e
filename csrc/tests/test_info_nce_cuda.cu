// info_nce on CUDA against a float64 loop: all outputs, all pairs of types, fast and generic passes.
//
// One source for the device (nvcc, also for compute-sanitizer) and for the host emulator (MOCO_EMULATE).
// Arguments: number of random cases (default 150), seed; in the emulator also multiprocessors (with 1, the default,
// every block has many tiles; with 40 the queue is split among many blocks).
//
// Tolerances. If u is the relative error of a product's operands, the error of a logit is at most
//   delta = u min(1, 2 / sqrt(C)) |q| max |n| / T, for rounding errors with independent signs,
// u = 2^-8 for bfloat16 queues (the query is rounded to 8 bits) and the least accuracy of float32 ones (both operands
// are), 2^-11 for float16 and the medium accuracy (tf32 has 2^-11, too), and 2^-21 without the square root for float32
// (rounding of sums). From this follow
//   |loss error| <= min(delta, (1 - p0) (exp(delta) - 1)), and for gradients, which are sums of p n / T, an error of
//   (1 - p0) (exp(2 delta) - 1 + u_p) (|n| + |k|) / T, u_p being the rounding of the probabilities and keys.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

#include "kernels/cuda.h"
#include "kernels/cuda/info_nce_sm90_launch.cuh"
#include "kernels/cuda/info_nce_softmax.cuh"
#ifdef MOCO_EMULATE
#include "emulator.h"
#endif

namespace {

namespace cuda = moco_ext::cuda;

struct Random {
  uint64_t state;
  uint64_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() >> 11) % n; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
};

float to_float(float x) { return x; }
float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
float to_float(__half x) { return __half2float(x); }
void assign(float& to, double x) { to = static_cast<float>(x); }
void assign(__nv_bfloat16& to, double x) { to = __float2bfloat16(static_cast<float>(x)); }
void assign(__half& to, double x) { to = __float2half(static_cast<float>(x)); }
const char* name(float) { return "float32"; }
const char* name(__nv_bfloat16) { return "bfloat16"; }
const char* name(__half) { return "float16"; }

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(error));
  exit(2);
}

template <typename T>
struct Array {
  T* data = nullptr;
  size_t count;
  explicit Array(size_t n) : count(n) {
    require(cudaMalloc(reinterpret_cast<void**>(&data), n * sizeof(T) + 1), "cudaMalloc");
    require(cudaMemset(data, 0xff, n * sizeof(T)), "cudaMemset");  // NaN, to detect elements that are not written
  }
  explicit Array(const std::vector<T>& host) : Array(host.size()) {
    require(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> values(count);
    require(cudaMemcpy(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }
};

struct Case {
  cuda::InfoNceShape shape;
  double temperature;
  bool temperature_on_device;
  bool normalize;
  bool gradient;
  int precision;       // of the products with a float32 queue
  bool misaligned;     // the queue starts one element after a 16-byte boundary
  bool easy;           // keys are close to their queries: the positive dominates
  double norm;         // of query and key, and of the queue's rows if not normalized
  int nan_row;         // or -1
  int zero_row;        // or -1
  int growth = 0;      // every 128 keys, four times, the queue's rows become longer by this power of two
  bool mixed = false;  // every other row of query and key has norm 1 instead

  double row_norm(int64_t row) const { return mixed && row % 2 == 1 ? 1 : norm; }
};

struct Results {
  std::vector<float> loss, lse, positive, grad_query, grad_key, grad_temperature;
  std::vector<int64_t> rank;
  bool operator==(const Results& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(loss, other.loss) && same(lse, other.lse) && same(positive, other.positive) && rank == other.rank &&
           same(grad_query, other.grad_query) && same(grad_key, other.grad_key) &&
           same(grad_temperature, other.grad_temperature);
  }
};

constexpr float kEps = 1e-12f;

template <typename Query, typename Queue>
Results run(const Case& c, const std::vector<Query>& query, const std::vector<Query>& key,
            const std::vector<Queue>& queue) {
  const auto n = static_cast<size_t>(c.shape.n);
  const size_t elements = c.gradient ? query.size() : 0;
  const Array<Query> device_query(query), device_key(key);
  Array<Queue> device_queue(queue.size() + 1);
  Queue* const queue_start = device_queue.data + c.misaligned;
  require(cudaMemcpy(queue_start, queue.data(), queue.size() * sizeof(Queue), cudaMemcpyHostToDevice), "cudaMemcpy");
  const Array<float> temperature(std::vector<float>{static_cast<float>(c.temperature)});
  Array<float> loss(n), lse(n), positive(n), grad_query(elements), grad_key(elements);
  Array<float> grad_temperature(c.gradient ? n : 0);
  Array<int64_t> rank(n);
  const cuda::InfoNceOptions options{c.temperature_on_device ? NAN : static_cast<float>(c.temperature),
                                     c.temperature_on_device ? temperature.data : nullptr, kEps, c.normalize,
                                     c.precision};
  const cuda::InfoNceOutputs outputs{loss.data,
                                     lse.data,
                                     positive.data,
                                     rank.data,
                                     c.gradient ? grad_query.data : nullptr,
                                     c.gradient ? grad_key.data : nullptr,
                                     c.gradient ? grad_temperature.data : nullptr};
  Array<char> workspace(cuda::info_nce_workspace_bytes(queue_start, c.shape, options, {}, c.gradient));
  require(cuda::info_nce(device_query.data, device_key.data, queue_start, nullptr, c.shape, options, {}, outputs,
                         workspace.data, cudaStream_t{}),
          "info_nce");
  require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return {loss.host(), lse.host(), positive.host(), grad_query.host(), grad_key.host(), grad_temperature.host(),
          rank.host()};
}

double norm_of(const double* x, int64_t c) {
  double square = 0;
  for (int64_t i = 0; i < c; ++i) square += x[i] * x[i];
  return std::sqrt(square);
}

// The largest error of a row, as a share of its tolerance.
template <typename Queue>
double row_error(const Case& c, int64_t row, const std::vector<double>& query, const std::vector<double>& key,
                 const std::vector<double>& queue, const Results& got) {
  const int64_t width = c.shape.c;
  const bool half = !std::is_same_v<Queue, float>;
  constexpr int64_t kFast[] = {64, 128, 256, 512, 768, 1024};
  const bool hopper = cuda::sm90_enabled() && width <= (half ? 768 : 128) && width * sizeof(Queue) % 16 == 0;
  const bool fast =
      (hopper || std::find(std::begin(kFast), std::end(kFast), width) != std::end(kFast)) && !c.misaligned;
  const double operand_error = !fast                                  ? 0x1p-21
                               : std::is_same_v<Queue, __nv_bfloat16> ? 0x1p-8
                               : half                                 ? 0x1p-11
                               : c.precision == 1                     ? 0x1p-8
                               : c.precision == 2                     ? 0x1p-11
                                                                      : 0x1p-21;
  const double product_error = 2 * operand_error;  // of the probabilities and keys
  const bool rounded = operand_error > 0x1p-20;
  std::vector<double> q(query.begin() + row * width, query.begin() + (row + 1) * width);
  std::vector<double> k(key.begin() + row * width, key.begin() + (row + 1) * width);
  const double query_norm = norm_of(q.data(), width);
  const double key_norm = norm_of(k.data(), width);
  const double query_divisor = c.normalize ? std::fmax(query_norm, kEps) : 1;
  const double key_divisor = c.normalize ? std::fmax(key_norm, kEps) : 1;
  double positive = 0;
  for (int64_t i = 0; i < width; ++i) {
    q[i] /= query_divisor;
    k[i] /= key_divisor;
    positive += q[i] * k[i];
  }
  const double t = static_cast<float>(c.temperature);
  std::vector<double> score(c.shape.k);
  double max = positive;
  double longest = norm_of(k.data(), width);
  for (int64_t j = 0; j < c.shape.k; ++j) {
    for (int64_t i = 0; i < width; ++i) score[j] += q[i] * queue[j * width + i];
    max = std::fmax(max, score[j]);
    longest = std::fmax(longest, norm_of(&queue[j * width], width));
  }
  if (row == c.nan_row) {
    bool all_nan = std::isnan(got.loss[row]) && std::isnan(got.lse[row]) && std::isnan(got.positive[row]);
    for (int64_t i = 0; c.gradient && i < width; ++i) all_nan &= std::isnan(got.grad_query[row * width + i]);
    return all_nan ? 0 : INFINITY;
  }
  double negatives = 0;  // relative to the maximum, like the rest
  double share = std::exp((positive - max) / t);
  std::vector<double> mean(width);
  for (int64_t j = 0; j < c.shape.k; ++j) {
    const double p = std::exp((score[j] - max) / t);
    negatives += p;
    for (int64_t i = 0; c.gradient && i < width; ++i) mean[i] += p * queue[j * width + i];
  }
  const double total = negatives + share;
  const double rest = negatives / total;
  const double loss = max == positive ? std::log1p(negatives) : (max - positive) / t + std::log(total);

  const double q_norm = norm_of(q.data(), width);
  // Rounding errors of C terms add up at random, to 0.11 of the bound (one standard deviation, C = 128), and a queue
  // may contain the same key many times.
  const double spread = rounded ? std::fmin(1, 5 / std::sqrt(static_cast<double>(width))) : 1;
  const double score_error = operand_error * spread * q_norm * longest + 0x1p-22 * q_norm * longest;
  const double delta = score_error / t + 1e-30;
  double worst = 0;
  const auto compare = [&](double error, double tolerance) {
    worst = std::fmax(worst, std::isnan(error) ? INFINITY : error / (tolerance + 1e-37));
  };
  const double loss_error = std::fmin(delta, rest * std::expm1(delta)) + 2e-6 * loss;
  const double positive_error = 0x1p-21 * q_norm * longest / t;
  compare(std::fabs(got.loss[row] - loss), loss_error);
  compare(std::fabs(got.positive[row] - positive / t), positive_error);
  compare(std::fabs(got.lse[row] - loss - positive / t),
          loss_error + positive_error + 0x1p-23 * std::fabs(positive / t));
  int64_t low = 0;
  int64_t high = 0;
  for (const double s : score) {
    low += s > positive + score_error;
    high += s > positive - score_error;
  }
  compare(got.rank[row] < low || got.rank[row] > high ? 1e30 : 0, 1);
  if (!c.gradient) return worst;

  std::vector<double> g(width);
  double dot = 0;
  for (int64_t i = 0; i < width; ++i) {
    g[i] = (mean[i] / total - rest * k[i]) / t;
    dot += g[i] * q[i];
  }
  const double share_error = std::expm1(2 * delta) + (rounded ? product_error : 0x1p-19);
  const double g_error = rest * share_error * 2 * longest / t;
  const bool conditioned = delta < 0.5;  // else probabilities are arbitrary, and the gradient must only be a number
  double query_difference = 0;
  double key_difference = 0;
  for (int64_t i = 0; i < width; ++i) {
    const bool clamped = query_norm <= kEps;
    const double grad_query = !c.normalize ? g[i] : (clamped ? g[i] : g[i] - dot * q[i]) / query_divisor;
    const double g_key = -rest * q[i] / t;
    const double key_dot = -rest * positive / t;
    const double grad_key = !c.normalize ? g_key : (key_norm <= kEps ? g_key : g_key - key_dot * k[i]) / key_divisor;
    query_difference += std::pow(got.grad_query[row * width + i] - grad_query, 2);
    key_difference += std::pow(got.grad_key[row * width + i] - grad_key, 2);
  }
  compare(conditioned ? std::sqrt(query_difference) : query_difference * 0, g_error / query_divisor);
  compare(conditioned ? std::sqrt(key_difference) : key_difference * 0,
          rest * (std::expm1(2 * delta) + 0x1p-19) * 2 * q_norm / t / key_divisor);
  const double temperature_error = got.grad_temperature[row] + dot / t;
  compare(conditioned ? std::fabs(temperature_error) : temperature_error * 0, g_error * 2 * q_norm / t);
  return worst;
}

int passed = 0;
int failed = 0;

template <typename Query, typename Queue>
void test(const Case& c, Random random) {
  const int64_t n = c.shape.n;
  const int64_t k = c.shape.k;
  const int64_t width = c.shape.c;
  std::vector<Query> query(n * width), key(n * width);
  std::vector<Queue> queue(k * width);
  const auto fill_row = [&](auto& rows, int64_t row, double norm, const double* near) {
    std::vector<double> x(width);
    for (int64_t i = 0; i < width; ++i) x[i] = random.normal() * (near ? 0.1 : 1) + (near ? near[i] : 0);
    const double scale = norm / norm_of(x.data(), width);
    for (int64_t i = 0; i < width; ++i) assign(rows[row * width + i], x[i] * scale);
  };
  std::vector<double> unscaled(width);
  for (int64_t row = 0; row < n; ++row) {
    const double norm = c.row_norm(row);
    fill_row(query, row, norm, nullptr);
    for (int64_t i = 0; i < width; ++i) unscaled[i] = to_float(query[row * width + i]) / norm * std::sqrt(width);
    fill_row(key, row, norm, c.easy ? unscaled.data() : nullptr);
    for (int64_t i = 0; i < width; ++i) {
      if (row == c.zero_row) assign(query[row * width + i], 0);
      if (row == c.zero_row - 1) assign(key[row * width + i], 0);
      if (row == c.nan_row && i == width / 2) assign(query[row * width + i], NAN);
    }
  }
  for (int64_t j = 0; j < k; ++j) {
    fill_row(queue, j, (c.normalize ? 1 : c.norm) * std::exp2(c.growth * (j / 128 % 4)), nullptr);
    const int64_t row = random.below(n + (n == 0));
    if (random.below(8) == 0 && row < n && row != c.nan_row) {  // a copy of the positive of some row
      const double scale = c.normalize ? 1 / c.row_norm(row) : 1;
      for (int64_t i = 0; i < width; ++i) assign(queue[j * width + i], to_float(key[row * width + i]) * scale);
    }
  }
  const auto doubles = [](const auto& values) {
    std::vector<double> out;
    for (const auto& value : values) out.push_back(to_float(value));
    return out;
  };
  const std::vector<double> exact_query = doubles(query), exact_key = doubles(key), exact_queue = doubles(queue);

  const Results first = run(c, query, key, queue);
#ifdef MOCO_EMULATE
  emu::config().seed += 1;  // a different schedule of threads and blocks
#endif
  const bool repeatable = first == run(c, query, key, queue);
  double worst = 0;
  int64_t worst_row = 0;
  for (int64_t row = 0; row < n; ++row) {
    const double error = row_error<Queue>(c, row, exact_query, exact_key, exact_queue, first);
    if (error > worst) {
      worst = error;
      worst_row = row;
    }
  }
  const bool good = worst <= 1 && repeatable;
  ++(good ? passed : failed);
  printf("%s n=%ld k=%ld c=%ld query=%s queue=%s%s T=%g%s norm=%g%s%s%s%s: error %.3f of tolerance (row %ld)%s\n",
         good ? "ok    " : "FAILED", static_cast<long>(n), static_cast<long>(k), static_cast<long>(width),
         name(Query{}), name(Queue{}),
         c.precision == 3   ? ""
         : c.precision == 2 ? " tf32"
                            : " bf16",
         c.temperature, c.temperature_on_device ? " on device" : "", c.norm, c.normalize ? " normalize" : "",
         c.gradient ? " gradient" : "", c.misaligned ? " misaligned" : "",
         c.easy     ? " easy"
         : c.growth ? " growing"
                    : "",
         worst, static_cast<long>(worst_row), repeatable ? "" : ", not repeatable");
  fflush(stdout);
}

// Every key scores above every positive, so a row's rank is the number of keys processed: K if each is processed once.
// The temperature is far above all scores, so its lse is log(K + 1).
template <typename Queue>
void test_visits(int64_t n, int64_t k, int64_t c, bool gradient, int precision) {
  const Case plain{{n, k, c}, 1e6, false, false, gradient, precision, false, false, 1, -1, -1};
  std::vector<float> query(n * c), key(n * c);
  std::vector<Queue> queue(k * c);
  for (int64_t i = 0; i < n; ++i) query[i * c] = 1, key[i * c] = -1;
  for (int64_t i = 0; i < k * c; ++i) assign(queue[i], i % c == 0 ? 1 : 0);
  const Results got = run(plain, query, key, queue);
  bool good = true;
  for (int64_t i = 0; i < n; ++i) {
    good &= got.rank[i] == k && std::fabs(got.lse[i] - std::log(k + 1.0)) < 0.1 / static_cast<double>(k);
  }
  ++(good ? passed : failed);
  printf("%s n=%ld k=%ld c=%ld queue=%s: every key once\n", good ? "ok    " : "FAILED", static_cast<long>(n),
         static_cast<long>(k), static_cast<long>(c), name(Queue{}));
}

template <int tiles>
__global__ void count_kernel(const float* scores, float positive, uint32_t* count) {
  float s[tiles][4];
  for (int i = 0; i < 4 * tiles; ++i) s[i / 4][i % 4] = scores[i % 8];
  count[0] = cuda::count_above(s, 0, positive);
  count[1] = cuda::count_above(s, 1, positive);
}

// Keys that score above the positive are counted exactly: neighbors of a float, ties, infinities and NaN.
void test_counts() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  Array<uint32_t> count(2);
  bool good = true;
  for (const float size : {0.0f, 1e-20f, 0.0731f, 0.5f, 1.0f, 3.9e5f, 3e38f, kInfinity, kNaN}) {
    for (const float positive : {size, -size}) {
      const float up = std::nextafter(positive, kInfinity), down = std::nextafter(positive, -kInfinity);
      const float smallest = std::numeric_limits<float>::min();  // scores nearer than this count as equal
      const std::vector<float> scores{positive == 0 ? smallest : up,
                                      positive == 0 ? -smallest : down,
                                      positive,
                                      -positive,
                                      kInfinity,
                                      -kInfinity,
                                      kNaN,
                                      0.0f};
      const Array<float> on_device(scores);
      uint32_t want[2] = {};
      for (size_t i = 0; i < scores.size(); ++i) want[i % 4 / 2] += scores[i] > positive;
      const auto counts = [&](auto kernel, uint32_t times) {
        require(cuda::launch(kernel, dim3(1), dim3(1), 0, nullptr, on_device.data, positive, count.data), "count");
        const std::vector<uint32_t> got = count.host();
        return got[0] == times * want[0] && got[1] == times * want[1];
      };
      good &= counts(count_kernel<2>, 1) && counts(count_kernel<16>, 8);
    }
  }
  ++(good ? passed : failed);
  printf("%s keys above the positive\n", good ? "ok    " : "FAILED");
}

template <typename Query>
void test_queue(int queue_type, const Case& c, const Random& random) {
  if (queue_type == 0) return test<Query, float>(c, random);
  if (queue_type == 1) return test<Query, __nv_bfloat16>(c, random);
  test<Query, __half>(c, random);
}

void test_types(int query_type, int queue_type, const Case& c, const Random& random) {
  if (query_type == 0) return test_queue<float>(queue_type, c, random);
  if (query_type == 1) return test_queue<__nv_bfloat16>(queue_type, c, random);
  test_queue<__half>(queue_type, c, random);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t random_cases = argc > 1 ? atoll(argv[1]) : 150;
  Random random{argc > 2 ? static_cast<uint64_t>(atoll(argv[2])) * 2 + 1 : 20191113};
#ifdef MOCO_EMULATE
  emu::config().multiprocessors = argc > 3 ? atoi(argv[3]) : 1;
#endif
  test_counts();
  const int64_t all_n[] = {1, 3, 64, 65, 130};
  const int64_t all_k[] = {1, 7, 64, 100, 333};
  const int64_t all_c[] = {64, 128, 256, 512, 768, 1024, 1, 3, 17, 96, 520};
  const double all_t[] = {0.01, 0.07, 1, 10};

  // Every C with every queue type and precision, with and without gradient.
  for (const int64_t c : all_c) {
    for (int type = 0; type < 5; ++type) {
      for (const bool gradient : {true, false}) {
        const int64_t n = c > 512 ? 17 : 65;  // wide rows are slow in the emulator
        const Case plain{
            {n, 5 * n + 8, c}, 0.07, false, true, gradient, type < 3 ? 3 : type - 2, false, false, 1, -1, -1};
        random.bits();
        test_types(0, type % 4 % 3, plain, random);
      }
    }
  }
  for (const int64_t c : {64, 128, 512, 768, 1024, 5}) {
    for (int i = 0; i < 3; ++i) {
      const int64_t n = 1 + random.below(200);
      const int64_t k = 1 + random.below(c > 512 ? 150 : 1500);
      test_visits<float>(n, k, c, i > 0, 1 + i);
      test_visits<__nv_bfloat16>(n, k, c, i > 0, 1);
      test_visits<__half>(n, k, c, i > 0, 1);
    }
  }
  // An odd number of splits: a warpgroup of the last block has none, and its warps may fall far behind each other.
#ifdef MOCO_EMULATE
  const emu::Config before = emu::config();
  emu::config().multiprocessors = 3;
  for (emu::config().seed = 2; emu::config().seed <= 12; emu::config().seed += 2) {
    test_visits<float>(3, 1600, 128, true, 3);
    test_visits<float>(3, 1600, 128, false, 3);
  }
  emu::config() = before;
#endif
  // Wide rows, with padding of rows, keys and columns.
  test_types(0, 1, {{1, 1, 264}, 0.07, false, true, true, 1, false, false, 1, -1, -1}, random);
  test_types(0, 2, {{65, 100, 384}, 0.07, true, true, true, 1, false, false, 1, 3, -1}, random);
  test_types(0, 1, {{64, 333, 512}, 0.01, false, true, true, 1, false, false, 1, -1, -1}, random);
  test_types(0, 1, {{130, 95, 640}, 1, true, false, true, 1, false, false, 100, 5, -1}, random);
  test_types(1, 2, {{66, 129, 768}, 0.01, true, true, true, 1, false, false, 1, 60, -1}, random);
  test_types(2, 2, {{3, 260, 768}, 0.07, false, true, false, 1, false, true, 1, -1, -1}, random);
  test_types(0, 0, {{0, 5, 64}, 0.07, false, true, true, 3, false, false, 1, -1, -1}, random);
  test_types(0, 0, {{1, 2100, 3}, 0.07, false, true, true, 3, false, false, 1, -1, -1}, random);  // most splits
  test_types(0, 0, {{2, 1100, 512}, 0.07, false, true, true, 3, false, false, 1, -1, -1}, random);
  // float32 keys of other sizes than unit rows: far larger, far smaller, and growing.
  for (const int precision : {2, 3}) {
    for (const double norm : {3e9, 1e4, 1e-4, 1e-9, 1e-17}) {
      for (const int64_t n : {70, 3}) {
        const double t = 0.07 * norm * norm;
        test_types(0, 0, {{n, 400, 128}, t, n < 64, false, true, precision, false, false, norm, -1, -1}, random);
      }
    }
    for (const bool gradient : {true, false}) {
      test_types(0, 0, {{66, 1000, 128}, 2e4, false, true, gradient, precision, false, false, 1, -1, -1, 5}, random);
      test_types(0, 0, {{3, 1500, 64}, 2e4, true, true, gradient, precision, false, false, 1, -1, -1, 5}, random);
    }
  }
  // Squares of norms overflow, or underflow.
  test_types(0, 0, {{3, 70, 128}, 0.07, false, true, true, 3, false, false, 1e25, -1, -1}, random);
  test_types(1, 1, {{19, 70, 256}, 0.07, false, true, true, 3, false, false, 1e30, -1, 4, 0, true}, random);
  test_types(1, 2, {{18, 70, 128}, 0.07, false, true, true, 3, false, true, 1e30, 5, -1, 0, true}, random);
  test_types(0, 0, {{70, 70, 64}, 0.07, false, true, true, 2, false, true, 1e36, -1, -1, 0, true}, random);
  test_types(0, 2, {{33, 70, 128}, 0.07, false, true, true, 3, false, true, 1e-11, -1, -1, 0, true}, random);
  test_types(0, 2, {{5, 70, 128}, 0.07, false, true, true, 3, false, false, 1e-20, -1, -1, 0, true}, random);
  test_types(0, 0, {{3, 70, 1100}, 0.07, false, true, true, 3, false, false, 1, -1, -1}, random);  // two spans
  // Several tiles per split, of which later ones have far larger scores.
#ifdef MOCO_EMULATE
  const int64_t many[][2] = {{3, 1500}, {66, 1000}};
#else
  const int64_t many[][2] = {{3, 140000}, {66, 40000}};
#endif
  for (const auto& [n, k] : many) {
    for (int type = 0; type < 4; ++type) {
      for (const int growth : {1, 3, 7}) {
        if (type != 1 && growth != 3) continue;  // 7 is beyond float16
#ifndef MOCO_EMULATE
        if (random_cases < 50 && (n < 66 || type != 1 || growth != 3)) continue;  // a sanitizer takes long for each
#endif
        test_types(0, type % 3,
                   {{n, k, type < 3 ? 128 : 64}, 0.07, false, true, growth < 7, 2, false, false, 1, -1, -1, growth},
                   random);
      }
    }
  }
  for (int64_t i = 0; i < random_cases; ++i) {
    const int64_t width = all_c[random.below(std::size(all_c))];
    const int64_t n = all_n[random.below(width > 512 ? 3 : 5)];
    Case c{{n, all_k[random.below(width > 512 ? 4 : 5)], width},
           all_t[random.below(4)],
           random.below(2) == 0,
           random.below(3) > 0,
           random.below(4) > 0,
           1 + static_cast<int>(random.below(3)),
           random.below(6) == 0,
           random.below(3) == 0,
           1,
           random.below(3) == 0 ? static_cast<int>(random.below(n)) : -1,
           -1};
    const double norms[] = {1, 1, 1e-4, 1e4};
    c.norm = norms[random.below(4)];
    if (c.normalize && n > 1 && random.below(2) == 0) {
      c.zero_row = 1 + static_cast<int>(random.below(n - 1));
      if (c.zero_row == c.nan_row) c.nan_row = -1;
    }
    const auto query_type = static_cast<int>(random.below(3));
    const auto queue_type = static_cast<int>(random.below(3));
    test_types(query_type, queue_type, c, random);
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
