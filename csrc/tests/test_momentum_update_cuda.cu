// momentum_update against float64 loops. `--large` (GPU only) adds a tensor of more than 2^31 elements.
#include <cstring>
#include <memory>
#include <numeric>

#include "check.h"
#include "kernels/cuda.h"

namespace {

using check::Device;
using check::Random;
using moco_ext::cuda::Dtype;
using moco_ext::cuda::momentum_update;
using moco_ext::cuda::MomentumTensor;

template <typename T>
constexpr Dtype kDtype = std::is_same_v<T, float>    ? Dtype::kFloat32
                         : std::is_same_v<T, __half> ? Dtype::kFloat16
                                                     : Dtype::kBFloat16;

// The memory of one tensor, its expected values and their comparison.
class Case {
 public:
  virtual ~Case() = default;
  virtual MomentumTensor tensor() const = 0;
  virtual void verify(double m, const std::string& what) const = 0;
};

template <typename Key, typename Query>
class TypedCase : public Case {
 public:
  TypedCase(Random& random, int64_t n, size_t key_offset, size_t query_offset)
      : key_(check::normal<Key>(random, static_cast<size_t>(n))),
        query_(check::normal<Query>(random, static_cast<size_t>(n))),
        device_key_(key_, key_offset),
        device_query_(query_, query_offset) {}

  MomentumTensor tensor() const override {
    return {device_key_.data(), device_query_.data(), static_cast<int64_t>(key_.size()), kDtype<Key>, kDtype<Query>};
  }

  void verify(double m, const std::string& what) const override {
    const auto got = device_key_.host();
    const double take = 1.0 - m;
    size_t wrong = got.size();
    for (size_t i = 0; i < got.size() && wrong == got.size(); ++i) {
      const double key = check::value(key_[i]), query = check::value(query_[i]);
      if (!check::close(got[i], m * key + take * query, 0.1 * (std::abs(m * key) + std::abs(take * query)))) wrong = i;
    }
    check::that(wrong == got.size(),
                what + ": numel " + std::to_string(got.size()) + ", first wrong at " + std::to_string(wrong));
  }

 private:
  std::vector<Key> key_;
  std::vector<Query> query_;
  Device<Key> device_key_;
  Device<Query> device_query_;
};

template <typename Key>
std::unique_ptr<Case> make_case(Random& random, Dtype query, int64_t n, size_t key_offset, size_t query_offset) {
  switch (query) {
    case Dtype::kFloat32:
      return std::make_unique<TypedCase<Key, float>>(random, n, key_offset, query_offset);
    case Dtype::kBFloat16:
      return std::make_unique<TypedCase<Key, __nv_bfloat16>>(random, n, key_offset, query_offset);
    default:
      return std::make_unique<TypedCase<Key, __half>>(random, n, key_offset, query_offset);
  }
}

std::unique_ptr<Case> make_case(Random& random, Dtype key, Dtype query, int64_t n, size_t key_offset,
                                size_t query_offset) {
  switch (key) {
    case Dtype::kFloat32:
      return make_case<float>(random, query, n, key_offset, query_offset);
    case Dtype::kBFloat16:
      return make_case<__nv_bfloat16>(random, query, n, key_offset, query_offset);
    default:
      return make_case<__half>(random, query, n, key_offset, query_offset);
  }
}

void run(const std::vector<std::unique_ptr<Case>>& cases, float m, bool on_device, const std::string& what) {
  std::vector<MomentumTensor> tensors;
  for (const auto& c : cases) tensors.push_back(c->tensor());
  const Device<float> m_ptr(std::vector<float>{m});
  check::cuda(momentum_update(tensors.data(), static_cast<int64_t>(tensors.size()), on_device ? NAN : m,
                              on_device ? m_ptr.data() : nullptr, nullptr));
  for (const auto& c : cases) c->verify(m, what);
}

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};

void test_pairs(Random& random) {
  for (const Dtype key : kDtypes) {
    for (const Dtype query : kDtypes) {
      const std::string what = std::string(kNames[static_cast<int>(key)]) + " <- " + kNames[static_cast<int>(query)];
      check::group(what + ": sizes and alignments, one tensor a launch");
      for (const int64_t n : {1, 3, 4, 7, 8, 255, 256, 4095, 4096, 4097, 8192, 12293}) {
        for (const size_t offsets : {0, 1, 2, 3}) {
          std::vector<std::unique_ptr<Case>> cases;
          cases.push_back(make_case(random, key, query, n, offsets & 1, offsets & 2));
          run(cases, 0.9f, (n & 1) != 0, what);
        }
      }
    }
  }
}

void test_lists(Random& random) {
  for (const int count : {2, 3, 63, 64, 65, 200}) {
    check::group(std::to_string(count) + " tensors of mixed dtypes, sizes and alignments");
    std::vector<std::unique_ptr<Case>> cases;
    for (int i = 0; i < count; ++i) {
      const int64_t n = check::uniform(random, 0, 3) == 0 ? 0 : check::uniform(random, 1, i % 16 == 0 ? 9000 : 300);
      cases.push_back(make_case(random, check::pick(random, kDtypes), check::pick(random, kDtypes), n,
                                static_cast<size_t>(check::uniform(random, 0, 3)),
                                static_cast<size_t>(check::uniform(random, 0, 3))));
    }
    run(cases, 0.999f, count % 2 == 0, "list");
  }
}

// Slices of one buffer, like flattened parameters; more of them than fit in one launch.
void test_many(Random& random) {
  for (const int count : {1000, 1001, 2300}) {
    check::group(std::to_string(count) + " slices of one buffer");
    std::vector<int64_t> sizes;
    for (int i = 0; i < count; ++i) sizes.push_back(i % 7 == 3 ? 0 : check::uniform(random, 1, 40));
    sizes[static_cast<size_t>(count) / 2] = 10000;
    const auto total = static_cast<size_t>(std::accumulate(sizes.begin(), sizes.end(), int64_t{0}));
    const auto key = check::normal<float>(random, total), query = check::normal<float>(random, total);
    const Device<float> device_key(key), device_query(query);
    std::vector<MomentumTensor> tensors;
    int64_t at = 0;
    for (const int64_t n : sizes) {
      tensors.push_back({device_key.data() + at, device_query.data() + at, n, Dtype::kFloat32, Dtype::kFloat32});
      at += n;
    }
    check::cuda(momentum_update(tensors.data(), count, 0.99f, nullptr, nullptr));
    const auto got = device_key.host();
    const double m = 0.99f;
    for (size_t i = 0; i < total; ++i) {
      if (check::close(got[i], m * key[i] + (1 - m) * query[i], 0.1 * std::abs(key[i]))) continue;
      check::that(false, "element " + std::to_string(i));
      break;
    }
    check::that(true, "all elements");
  }
}

// float32 keys with low-precision copies: the copy is the rounded key, for all alignments.
template <typename Query, typename LowPrecision>
void test_low_precision(Random& random) {
  check::group(std::string("low-precision copy ") + check::name<LowPrecision>() + ", query " + check::name<Query>());
  for (const int count : {1, 3, 900}) {
    std::vector<Device<float>> keys;
    std::vector<Device<Query>> queries;
    std::vector<Device<LowPrecision>> low_precision;
    std::vector<std::vector<float>> before;
    std::vector<std::vector<Query>> towards;
    std::vector<MomentumTensor> tensors;
    for (int i = 0; i < count; ++i) {
      const auto n = static_cast<size_t>(count == 1 ? 9001 : check::uniform(random, 0, 40));
      const auto offset = static_cast<size_t>(i % 3);
      before.push_back(check::normal<float>(random, n));
      towards.push_back(check::normal<Query>(random, n));
      keys.emplace_back(before.back());
      queries.emplace_back(towards.back(), offset);
      low_precision.emplace_back(std::vector<LowPrecision>(n, check::element<LowPrecision>(NAN)), offset);
      tensors.push_back({keys.back().data(), queries.back().data(), static_cast<int64_t>(n), Dtype::kFloat32,
                         kDtype<Query>, low_precision.back().data(), kDtype<LowPrecision>});
    }
    check::cuda(momentum_update(tensors.data(), count, 0.75f, nullptr, nullptr));
    for (int i = 0; i < count; ++i) {
      const auto key = keys[i].host();
      const auto copy = low_precision[i].host();
      bool good = true;
      for (size_t j = 0; j < key.size(); ++j) {
        const double want = 0.75 * before[i][j] + 0.25 * check::value(towards[i][j]);
        good &= check::close(key[j], want, std::abs(want) + 1);
        good &= check::value(copy[j]) == check::value(check::element<LowPrecision>(key[j]));
      }
      check::that(good, "tensor " + std::to_string(i) + " of " + std::to_string(count));
    }
  }
}

void test_edges(Random& random) {
  check::group("m of 0 and 1, empty lists and tensors");
  for (const float m : {0.0f, 1.0f, 0.5f}) {
    for (const bool on_device : {false, true}) {
      std::vector<std::unique_ptr<Case>> cases;
      cases.push_back(make_case(random, Dtype::kFloat32, Dtype::kFloat32, 5000, 0, 0));
      cases.push_back(make_case(random, Dtype::kBFloat16, Dtype::kFloat16, 77, 0, 0));
      run(cases, m, on_device, "m = " + std::to_string(m));
    }
  }
  check::that(momentum_update(nullptr, 0, 0.9f, nullptr, nullptr) == cudaSuccess, "empty list");
  const std::vector<MomentumTensor> empty(1500, {nullptr, nullptr, 0, Dtype::kFloat32, Dtype::kFloat32});
  for (const int64_t count : {1, 2, 64, 65, 1000, 1500}) {
    check::that(momentum_update(empty.data(), count, 0.9f, nullptr, nullptr) == cudaSuccess, "only empty tensors");
  }
}

void test_large() {
  check::group("more than 2^31 elements");
  const int64_t n = (int64_t{1} << 31) + 4096 + 3;
  __nv_bfloat16 *key = nullptr, *query = nullptr;
  check::cuda(cudaMalloc(reinterpret_cast<void**>(&key), static_cast<size_t>(n) * 2));
  check::cuda(cudaMalloc(reinterpret_cast<void**>(&query), static_cast<size_t>(n) * 2));
  check::cuda(cudaMemset(key, 0, static_cast<size_t>(n) * 2));
  check::cuda(cudaMemset(query, 0x3f, static_cast<size_t>(n) * 2));  // 0x3f3f: 0.74609375
  const MomentumTensor tensor{key, query, n, Dtype::kBFloat16, Dtype::kBFloat16};
  check::cuda(momentum_update(&tensor, 1, 0.5f, nullptr, nullptr));
  check::cuda(cudaDeviceSynchronize());
  for (const int64_t at : {int64_t{0}, n / 2, (int64_t{1} << 31) - 1, int64_t{1} << 31, n - 4, n - 1}) {
    __nv_bfloat16 got;
    check::cuda(cudaMemcpy(&got, key + at, 2, cudaMemcpyDeviceToHost));
    check::that(check::value(got) == 0.74609375 / 2, "element " + std::to_string(at));
  }
  cudaFree(key);
  cudaFree(query);
}

}  // namespace

int main(int argc, char** argv) {
  Random random(1);
  test_pairs(random);
  test_lists(random);
  test_many(random);
  test_edges(random);
  test_low_precision<float, __nv_bfloat16>(random);
  test_low_precision<__nv_bfloat16, __nv_bfloat16>(random);
  test_low_precision<float, __half>(random);
  if (argc > 1 && strcmp(argv[1], "--large") == 0) test_large();
  return check::finish();
}
