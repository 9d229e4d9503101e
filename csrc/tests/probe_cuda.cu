// Times a launcher alone on the GPU, without torch, and prints a JSON object: microseconds a call, all samples. Before,
// some results are compared with float64; the exit status is 1 if they differ by more than the tolerance.
//
//   probe_cuda info_nce N K C QUEUE_DTYPE [TERMS] [forward]    raw queries to loss and gradient, or to the loss alone
//   probe_cuda info_nce N K C QUEUE_DTYPE [TERMS] near         keys near the queries, as in training, not random ones
//   probe_cuda momentum_update [copy]                          ResNet-50's parameters; with a bfloat16 copy
//   probe_cuda enqueue B QUEUE_DTYPE
//   probe_cuda copy                                            the limit of memory bandwidth
//
// With `once` as the last argument: one call between cudaProfilerStart and cudaProfilerStop, for ncu.
//
// A sample is the replay of a graph of kCalls calls, right after another replay, so that the graph's start does not
// count. The calls read different queues in turn, together several times as large as L2.
#include <cuda_profiler_api.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "check.h"
#include "kernels/cuda.h"

namespace {

namespace cuda = moco_ext::cuda;

constexpr int kCalls = 20;
constexpr int kSamples = 15;
constexpr float kTemperature = 0.07f;

bool once = false;
bool keys_near = false;
cudaStream_t stream;
cudaDeviceProp device;

// Uniform in [-limit, limit], from a hash of the index.
template <typename T>
__global__ void fill_kernel(T* x, int64_t n, float limit, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 0x9e3779b9 + seed * 0x85ebca6b + static_cast<uint32_t>(i >> 32);
    h = (h ^ (h >> 16)) * 0x7feb352d;
    h = (h ^ (h >> 15)) * 0x846ca68b;
    h ^= h >> 16;
    x[i] = static_cast<T>(limit * (static_cast<float>(h) * 0x1p-31f - 1));
  }
}

__global__ void approach_kernel(float* key, const float* query, int64_t n) {  // to a cosine of about 0.9
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    key[i] = query[i] + 0.5f * key[i];
  }
}

template <typename T>
class Array {
 public:
  explicit Array(int64_t n, float limit = 0, uint32_t seed = 0) : size(n) {
    check::cuda(cudaMalloc(reinterpret_cast<void**>(&data), std::max<int64_t>(n, 1) * sizeof(T)));
    check::cuda(cudaMemsetAsync(data, 0xff, n * sizeof(T), stream));  // NaN
    if constexpr (!std::is_integral_v<T>) {
      if (limit > 0) fill_kernel<<<1024, 256, 0, stream>>>(data, n, limit, seed);
    }
    check::cuda(cudaGetLastError());
  }
  Array(Array&& other) : data(other.data), size(other.size) { other.data = nullptr; }
  ~Array() { cudaFree(data); }
  std::vector<T> host(int64_t from, int64_t n) const {
    std::vector<T> out(n);
    check::cuda(cudaMemcpy(out.data(), data + from, n * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
  T* data = nullptr;
  int64_t size;
};

std::vector<float> microseconds(const std::function<void(int)>& call) {
  cudaGraph_t graph;
  cudaGraphExec_t run;
  cudaEvent_t begin, end;
  check::cuda(cudaEventCreate(&begin));
  check::cuda(cudaEventCreate(&end));
  check::cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kCalls; ++i) call(i);
  check::cuda(cudaStreamEndCapture(stream, &graph));
  check::cuda(cudaGraphInstantiate(&run, graph, 0));
  std::vector<float> samples(kSamples);
  for (float& sample : samples) {
    check::cuda(cudaGraphLaunch(run, stream));
    check::cuda(cudaEventRecord(begin, stream));
    check::cuda(cudaGraphLaunch(run, stream));
    check::cuda(cudaEventRecord(end, stream));
    check::cuda(cudaStreamSynchronize(stream));
    check::cuda(cudaEventElapsedTime(&sample, begin, end));
    sample *= 1000.0f / kCalls;
  }
  check::cuda(cudaGraphExecDestroy(run));
  check::cuda(cudaGraphDestroy(graph));
  check::cuda(cudaEventDestroy(begin));
  check::cuda(cudaEventDestroy(end));
  return samples;
}

// flop, bytes: the least that the work needs. `error` compares the first call's results with float64.
int report(double flop, double bytes, double tolerance, const std::function<void(int)>& call,
           const std::function<double()>& error) {
  call(0);
  check::cuda(cudaStreamSynchronize(stream));
  if (once) {
    check::cuda(cudaProfilerStart());
    call(1);
    check::cuda(cudaStreamSynchronize(stream));
    check::cuda(cudaProfilerStop());
    return 0;
  }
  const double found = error();
  const bool correct = found <= tolerance;  // not so for NaN
  const std::vector<float> samples = microseconds(call);
  std::vector<float> sorted = samples;
  std::sort(sorted.begin(), sorted.end());
  printf("{\"device\": \"%s\", \"us\": %.3f, \"min_us\": %.3f, ", device.name, sorted[kSamples / 2], sorted[0]);
  printf("\"flop\": %.6g, \"bytes\": %.6g, \"calls\": %d, \"correct\": %s, \"error\": \"%.1e\", \"samples\": [", flop,
         bytes, kCalls, correct ? "true" : "false", found);  // quoted: JSON has no NaN
  for (int i = 0; i < kSamples; ++i) printf("%s%.3f", i == 0 ? "" : ", ", samples[i]);
  printf("]}\n");
  return correct ? 0 : 1;
}

// The relative error of the loss of a row, and of its gradient unless that is null, against float64.
template <typename Queue>
double row_error(const cuda::InfoNceShape& shape, int64_t row, const Array<float>& query, const Array<float>& key,
                 const std::vector<Queue>& queue, const Array<float>& loss, const Array<float>* grad_query) {
  const auto c = static_cast<size_t>(shape.c);
  const auto unit = [&](const Array<float>& rows, double* norm) {
    const std::vector<float> x = rows.host(row * shape.c, shape.c);
    *norm = 0;
    for (const float value : x) *norm += double{value} * value;
    *norm = std::sqrt(*norm);
    std::vector<double> out(x.begin(), x.end());
    for (double& value : out) value /= *norm;
    return out;
  };
  double query_norm = 0, key_norm = 0, positive = 0;
  const std::vector<double> q = unit(query, &query_norm), k = unit(key, &key_norm);
  for (size_t i = 0; i < c; ++i) positive += q[i] * k[i];
  double total = 1;  // relative to the positive: unit rows keep exponents below 2 / T
  std::vector<double> g(c);
  for (size_t j = 0; j < queue.size() / c; ++j) {
    double score = 0;
    for (size_t i = 0; i < c; ++i) score += q[i] * check::value(queue[j * c + i]);
    const double p = std::exp((score - positive) / kTemperature);
    total += p;
    for (size_t i = 0; i < c; ++i) g[i] += p * check::value(queue[j * c + i]);
  }
  double dot = 0;
  for (size_t i = 0; i < c; ++i) {
    g[i] = (g[i] / total - (1 - 1 / total) * k[i]) / kTemperature;
    dot += g[i] * q[i];
  }
  const double loss_error = std::abs(loss.host(row, 1)[0] / std::log(total) - 1);
  if (grad_query == nullptr) return loss_error;
  const std::vector<float> got = grad_query->host(row * shape.c, shape.c);
  double difference = 0, size = 0;
  for (size_t i = 0; i < c; ++i) {
    const double want = (g[i] - dot * q[i]) / query_norm;
    difference += (got[i] - want) * (got[i] - want);
    size += want * want;
  }
  const double gradient_error = std::sqrt(difference / size);
  return gradient_error > loss_error || std::isnan(gradient_error) ? gradient_error : loss_error;
}

template <typename Queue>
int info_nce(int64_t n, int64_t k, int64_t c, int precision, bool gradient) {
  const cuda::InfoNceShape shape{n, k, c};
  const cuda::InfoNceOptions options{kTemperature, nullptr, 1e-12f, true, precision};
  const float limit = std::sqrt(3.0f / static_cast<float>(c));  // rows of length 1, nearly
  const Array<float> query(n * c, limit, 1), key(n * c, limit, 2);
  if (keys_near) approach_kernel<<<1024, 256, 0, stream>>>(key.data, query.data, n * c);
  const int64_t queue_bytes = k * c * int64_t{sizeof(Queue)};
  const int64_t rotated = std::clamp<int64_t>(4 * int64_t{device.l2CacheSize} / queue_bytes + 1, 1, kCalls);
  std::vector<Array<Queue>> queues;
  for (int64_t i = 0; i < rotated; ++i) queues.emplace_back(k * c, limit, static_cast<uint32_t>(3 + i));
  const Array<float> loss(n), lse(n), positive(n), grad_query(n * c);
  const Array<int64_t> rank(n);
  const cuda::InfoNceOutputs outputs{
      loss.data, lse.data, positive.data, rank.data, gradient ? grad_query.data : nullptr, nullptr, nullptr};
  const Array<char> workspace(
      static_cast<int64_t>(cuda::info_nce_workspace_bytes(queues[0].data, shape, options, {}, gradient)));
  const auto call = [&](int i) {
    check::cuda(cuda::info_nce(query.data, key.data, queues[i % rotated].data, nullptr, shape, options, {}, outputs,
                               workspace.data, stream));
  };
  const auto error = [&] {
    const std::vector<Queue> queue = queues[0].host(0, k * c);
    double worst = 0;
    for (const int64_t row : {int64_t{0}, n / 3, n - 1}) {
      const double found = row_error(shape, row, query, key, queue, loss, gradient ? &grad_query : nullptr);
      if (found > worst || std::isnan(found)) worst = found;
    }
    return worst;
  };
  const double tolerance = sizeof(Queue) == 2 || precision < 3 ? 5e-3 : 1e-4;  // operands of 8 or 11 bits, and of 22
  const double product = 2.0 * n * k * c;
  const double bytes = static_cast<double>(queue_bytes) + 4.0 * n * c * (gradient ? 3 : 2);
  return report(gradient ? 2 * product : product, bytes, tolerance, call, error);
}

int momentum_update(bool copy) {
  const int64_t n = 25'557'032;
  const Array<float> key(n, 1, 1), query(n, 1, 2);
  const Array<__nv_bfloat16> low(n);
  const double want = 0.999 * key.host(n - 1, 1)[0] + 0.001 * query.host(n - 1, 1)[0];
  cuda::MomentumTensor tensor{key.data, query.data, n, cuda::Dtype::kFloat32, cuda::Dtype::kFloat32};
  if (copy) tensor.low_precision = low.data;
  return report(
      3.0 * n, (copy ? 14.0 : 12.0) * n, 1e-6,
      [&](int) { check::cuda(cuda::momentum_update(&tensor, 1, 0.999f, nullptr, stream)); },
      [&] { return std::abs(key.host(n - 1, 1)[0] - want); });
}

template <typename Queue>
int enqueue(int64_t b) {
  const int64_t k = 65536, c = 128;
  const Array<float> keys(b * c, 1, 1);
  const Array<Queue> queue(k * c);
  const Array<int64_t> pointer(1);
  check::cuda(cudaMemsetAsync(pointer.data, 0, sizeof(int64_t), stream));
  return report(
      0, (4.0 + sizeof(Queue)) * b * c, 4e-3,
      [&](int) {
        check::cuda(cuda::enqueue(queue.data, pointer.data, keys.data, k, b, c, 0, k, false, 1e-12f, stream));
      },
      [&] { return std::abs(check::value(queue.host(b * c - 1, 1)[0]) - keys.host(b * c - 1, 1)[0]); });
}

int copy() {
  const int64_t n = int64_t{1} << 28;
  const Array<float> from(n, 1, 1), to(n);
  const auto call = [&](int) {
    check::cuda(cudaMemcpyAsync(to.data, from.data, n * sizeof(float), cudaMemcpyDeviceToDevice, stream));
  };
  return report(0, 8.0 * n, 0, call, [&] { return std::abs(to.host(n - 1, 1)[0] - from.host(n - 1, 1)[0]); });
}

int run(const std::vector<std::string>& arguments) {
  const auto word = [&](size_t i) { return i < arguments.size() ? arguments[i] : std::string(); };
  const auto number = [&](size_t i) { return std::atoll(word(i).c_str()); };
  if (word(0) == "copy") return copy();
  if (word(0) == "momentum_update") return momentum_update(word(1) == "copy");
  if (word(0) == "enqueue") return word(2) == "float32" ? enqueue<float>(number(1)) : enqueue<__nv_bfloat16>(number(1));
  if (word(0) != "info_nce" || arguments.size() < 5) {
    printf("probe_cuda: expected info_nce, momentum_update, enqueue or copy; see the source\n");
    return 2;
  }
  const bool gradient = arguments.back() != "forward";
  const int precision = number(5) > 0 ? static_cast<int>(number(5)) : 3;
  if (word(4) == "float32") return info_nce<float>(number(1), number(2), number(3), precision, gradient);
  if (word(4) == "float16") return info_nce<__half>(number(1), number(2), number(3), precision, gradient);
  return info_nce<__nv_bfloat16>(number(1), number(2), number(3), precision, gradient);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  if (!arguments.empty() && arguments.back() == "once") once = true, arguments.pop_back();
  if (!arguments.empty() && arguments.back() == "near") keys_near = true, arguments.pop_back();
  check::cuda(cudaGetDeviceProperties(&device, 0));
  check::cuda(cudaStreamCreate(&stream));
  return run(arguments);
}
