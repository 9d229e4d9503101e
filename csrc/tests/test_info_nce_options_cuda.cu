// The options of info_nce on CUDA against a float64 loop, alone and combined: ids, in-batch keys and their gradient, a
// number of valid keys, label smoothing, a target, and what the own key is.
//
// Arguments: number of random cases (default 100), seed; in the emulator also multiprocessors. Tolerances as in
// python_tests/cases.py: rounding gives a logit of size L an absolute error of `unit` max(1, L / 20), with a unit of
// 1e-5 in float32, else four units in the last place of the operands' type. The tolerance of gradients is that share of
// their largest possible size.
#include <algorithm>

#include "check.h"
#include "kernels/cuda.h"

namespace {

namespace cuda = moco_ext::cuda;
using check::Device;

struct Case {
  int64_t n, k, c, m, key_offset, num_valid;  // num_valid: -1 all, on the device where `valid_on_device`
  bool valid_on_device, in_batch, ids, positive, normalize, tf32;
  int names;  // number of different ids
  double smoothing, temperature;
  bool hidden = false;  // queue keys that are NaN or infinite, masked out of all rows but the last
  bool alone = false;   // no row has a negative
  bool target = false;
  bool has_key = true;
  cuda::OwnKey own_key = cuda::OwnKey::kPositive;
  bool only = false;  // keys of other ids are masked out
  double queue_norm = 1;
  bool sees_nan(int64_t row) const { return hidden && !in_batch && row == n - 1; }
};

std::string describe(const Case& x, const char* query, const char* queue) {
  char text[256];
  std::snprintf(text, sizeof text,
                "n=%ld k=%ld c=%ld m=%ld key_offset=%ld num_valid=%ld%s%s%s%s%s%s%s%s%s T=%g smoothing=%g %s on %s",
                long(x.n), long(x.k), long(x.c), long(x.m), long(x.key_offset), long(x.num_valid),
                x.valid_on_device ? " on device" : "", x.in_batch ? " in_batch" : "",
                !x.ids       ? ""
                : x.positive ? " positive"
                             : " mask",
                x.target ? " target" : "", x.has_key ? "" : " no key", x.only ? " only" : "",
                x.own_key == cuda::OwnKey::kPositive    ? ""
                : x.own_key == cuda::OwnKey::kDecoupled ? " decoupled"
                                                        : " excluded",
                x.normalize ? " normalize" : "", x.tf32 ? " tf32" : "", x.temperature, x.smoothing, query, queue);
  return text;
}

struct Exact {
  std::vector<double> loss, lse, rank_low, rank_high, grad_query, grad_key, grad_temperature, bound_query;
  std::vector<double> bound_key, bound_loss;
};

std::vector<double> unit_rows(const std::vector<double>& x, int64_t rows, int64_t c, bool normalize,
                              std::vector<double>& norm) {
  std::vector<double> out = x;
  norm.assign(rows, 1);
  for (int64_t i = 0; i < rows && normalize; ++i) {
    double square = 0;
    for (int64_t f = 0; f < c; ++f) square += x[i * c + f] * x[i * c + f];
    norm[i] = std::max(std::sqrt(square), 1e-12);
    for (int64_t f = 0; f < c; ++f) out[i * c + f] /= norm[i];
  }
  return out;
}

// In float64, from the definition: all candidates of a row, their weights in the target, their probabilities.
Exact exact(const Case& x, const std::vector<double>& query, const std::vector<double>& key,
            const std::vector<double>& queue, const std::vector<double>& given, const std::vector<int64_t>& key_ids,
            const std::vector<int64_t>& queue_ids, const std::vector<double>& upstream, double unit) {
  const int64_t c = x.c;
  std::vector<double> q_norm, k_norm;
  const std::vector<double> q = unit_rows(query, x.n, c, x.normalize, q_norm);
  const std::vector<double> k = unit_rows(key, x.m, c, x.normalize, k_norm);
  Exact e;
  std::vector<double> key_sum(x.m * c);
  double key_bound = 0;
  for (int64_t i = 0; i < x.n; ++i) {
    struct Candidate {
      const double* row;
      int64_t key;  // in-batch, or -1
      bool positive;
      double score;
    };
    // The own key first. It is a positive, or nothing; a candidate, or not.
    const bool has_own = x.has_key && x.own_key != cuda::OwnKey::kExcluded;
    const bool candidate = has_own && x.own_key == cuda::OwnKey::kPositive;
    const std::vector<double> none(c);
    const double* own = x.has_key ? &k[(x.key_offset + i) * c] : none.data();
    std::vector<Candidate> all{{own, x.key_offset + i, has_own, 0}};
    const auto add = [&](const double* row, int64_t in_batch, int64_t id) {
      const int64_t mine = x.ids ? key_ids[x.key_offset + i] : -1;
      const bool same = x.ids && mine >= 0 && mine == id;
      if (x.only ? same : !same || x.positive) all.push_back({row, in_batch, same && x.positive, 0});
    };
    for (int64_t j = 0; x.in_batch && j < x.m; ++j) {
      if (j != x.key_offset + i) add(&k[j * c], j, x.ids ? key_ids[j] : -1);
    }
    for (int64_t j = 0; j < (x.num_valid < 0 ? x.k : x.num_valid); ++j)
      add(&queue[j * c], -1, x.ids ? queue_ids[j] : -1);

    double top = -INFINITY, longest = 0, largest = 0, given_score = 0, given_square = 0;
    int positives = 0;
    for (int64_t f = 0; x.target && f < c; ++f) {
      given_score += q[i * c + f] * given[i * c + f];
      given_square += given[i * c + f] * given[i * c + f];
    }
    longest = std::sqrt(given_square);
    largest = std::abs(given_score) / x.temperature;
    for (Candidate& a : all) {
      double square = 0;
      for (int64_t f = 0; f < c; ++f) {
        a.score += q[i * c + f] * a.row[f];
        square += a.row[f] * a.row[f];
      }
      if (&a != &all[0] || candidate) top = std::max(top, a.score);
      longest = std::max(longest, std::sqrt(square));
      largest = std::max(largest, std::abs(a.score) / x.temperature);
      positives += a.positive;
    }
    double total = 0, target = 0, expected = 0;
    for (const Candidate& a : all) {
      if (&a != &all[0] || candidate) total += std::exp((a.score - top) / x.temperature);
    }
    const double lse = top / x.temperature + std::log(total);
    const double tolerance = unit * std::max(1.0, largest / 20);
    std::vector<double> g(c);
    double low = 0, high = 0;
    const double threshold = has_own ? all[0].score : given_score;
    const bool lost = positives == 0 && !x.target;  // no positive: no loss
    for (const Candidate& a : all) {
      double w = (a.positive ? (1 - x.smoothing) / positives : 0) + x.smoothing / double(all.size());
      if (x.target) w = 0;
      double p = &a != &all[0] || candidate ? std::exp(a.score / x.temperature - lse) : 0;
      if (lost) p = 0;
      target += w * a.score;
      expected += p * a.score;
      for (int64_t f = 0; f < c; ++f) g[f] += (p - w) * a.row[f] / x.temperature;
      if (a.key >= 0 && (x.in_batch || a.row == own)) {
        for (int64_t f = 0; f < c; ++f) {
          key_sum[a.key * c + f] += (x.in_batch ? upstream[i] : 1) * (p - w) * q[i * c + f] / x.temperature;
        }
      }
      const double margin = tolerance * std::max(1.0, largest) * x.temperature;
      if (!a.positive) {
        low += &a != &all[0] && a.score > threshold + margin;
        high += &a != &all[0] && a.score > threshold - margin;
      }
    }
    target += given_score;
    for (int64_t f = 0; x.target && f < c; ++f) g[f] -= given[i * c + f] / x.temperature;
    if (!has_own && !x.target) low = high = -1;
    double dot = 0, q_length = 0;
    for (int64_t f = 0; f < c; ++f) {
      dot += g[f] * q[i * c + f];
      q_length += q[i * c + f] * q[i * c + f];
    }
    q_length = std::sqrt(q_length);
    for (int64_t f = 0; f < c; ++f) e.grad_query.push_back((g[f] - (x.normalize ? dot * q[i * c + f] : 0)) / q_norm[i]);
    e.loss.push_back(lost ? 0 : lse - target / x.temperature);
    e.lse.push_back(lse);
    e.rank_low.push_back(low);
    e.rank_high.push_back(high);
    e.grad_temperature.push_back(-(expected - target) / (x.temperature * x.temperature));
    e.bound_loss.push_back(tolerance * std::max(1.0, largest));
    e.bound_query.push_back(tolerance * 2 * longest / x.temperature / q_norm[i]);
    key_bound += tolerance * 2 * q_length * std::abs(x.in_batch ? upstream[i] : 1) / x.temperature;
  }
  for (int64_t j = 0; x.has_key && j < x.m; ++j) {
    double dot = 0;
    for (int64_t f = 0; f < c; ++f) dot += key_sum[j * c + f] * k[j * c + f];
    for (int64_t f = 0; f < c; ++f) {
      e.grad_key.push_back((key_sum[j * c + f] - (x.normalize ? dot * k[j * c + f] : 0)) / k_norm[j]);
    }
    e.bound_key.push_back(key_bound / k_norm[j]);
  }
  return e;
}

double distance(const float* got, const double* want, int64_t n) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += (got[i] - want[i]) * (got[i] - want[i]);
  return std::sqrt(square);
}

template <typename T>
std::vector<double> values(const std::vector<T>& x) {
  std::vector<double> out;
  for (const T& v : x) out.push_back(check::value(v));
  return out;
}

template <typename Query, typename Queue>
void test(const Case& x, check::Random& random) {
  const std::vector<Query> query = check::normal<Query>(random, x.n * x.c, 1 / std::sqrt(double(x.c)));
  const std::vector<Query> key = check::normal<Query>(random, x.m * x.c, 1 / std::sqrt(double(x.c)));
  std::vector<double> norms;
  const std::vector<double> rows = unit_rows(values(check::normal<float>(random, x.k * x.c)), x.k, x.c, true, norms);
  std::vector<Queue> queue;
  for (const double v : rows) queue.push_back(check::element<Queue>(v * x.queue_norm));
  std::vector<int64_t> key_ids(x.m), queue_ids(x.k);
  for (int64_t& id : key_ids) id = check::uniform(random, -1, x.names - 1);
  for (int64_t& id : queue_ids) id = check::uniform(random, -1, x.names - 1);
  // Keys from num_valid on do not count, whatever they are.
  if (x.num_valid >= 0) std::fill(queue.begin() + x.num_valid * x.c, queue.end(), check::element<Queue>(NAN));
  if (x.hidden) {
    for (int64_t i = 0; i < x.m; ++i) key_ids[i] = x.sees_nan(i) ? 1 : 0;
    for (int64_t j = 0; j < x.k; ++j) {
      if (queue_ids[j] == 0) queue[j * x.c + j % x.c] = check::element<Queue>(j % 3 == 0 ? -INFINITY : NAN);
    }
  }
  const std::vector<float> upstream = check::normal<float>(random, x.n);
  const std::vector<float> target = check::normal<float>(random, x.target ? x.n * x.c : 0, 1 / std::sqrt(double(x.c)));

  const bool no_queue = x.k == 0;
  const Device<Query> d_query(query), d_key(key);
  const Device<Queue> d_queue(queue);
  const Device<int64_t> d_key_ids(key_ids), d_queue_ids(queue_ids), d_num_valid(std::vector<int64_t>{x.num_valid});
  const Device<float> d_upstream(upstream), d_target(target), d_temperature(std::vector<float>{float(x.temperature)});
  const auto floats = [](int64_t n) { return Device<float>(std::vector<float>(n, NAN)); };
  const auto loss = floats(x.n), lse = floats(x.n), positive = floats(x.n), grad_query = floats(x.n * x.c);
  const auto grad_key = floats(x.m * x.c), grad_temperature = floats(x.n), weights = floats(3 * x.n);
  const Device<int64_t> rank(std::vector<int64_t>(x.n, -7));
  const cuda::InfoNceOptions options{NAN, d_temperature.data(), 1e-12f, x.normalize, x.tf32 ? 2 : 3};
  const cuda::InfoNceContrast contrast{x.in_batch,
                                       x.m,
                                       x.key_offset,
                                       x.valid_on_device && x.num_valid >= 0 ? d_num_valid.data() : nullptr,
                                       float(x.smoothing),
                                       x.ids ? d_key_ids.data() + x.key_offset : nullptr,
                                       x.ids ? d_key_ids.data() : nullptr,
                                       x.ids && !no_queue ? d_queue_ids.data() : nullptr,
                                       x.positive,
                                       x.own_key,
                                       x.only};
  const cuda::InfoNceShape shape{x.n, x.num_valid >= 0 && !x.valid_on_device ? x.num_valid : x.k, x.c};
  const cuda::InfoNceOutputs outputs{loss.data(),
                                     lse.data(),
                                     positive.data(),
                                     rank.data(),
                                     grad_query.data(),
                                     x.in_batch || !x.has_key ? nullptr : grad_key.data(),
                                     grad_temperature.data(),
                                     x.in_batch ? weights.data() : nullptr};
  const Device<char> workspace(std::vector<char>(
      cuda::info_nce_workspace_bytes(no_queue ? nullptr : d_queue.data(), shape, options, contrast, true), char(0xff)));
  check::cuda(cuda::info_nce(d_query.data(), x.has_key ? d_key.data() : nullptr, no_queue ? nullptr : d_queue.data(),
                             x.target ? d_target.data() : nullptr, shape, options, contrast, outputs, workspace.data(),
                             cudaStream_t{}));
  if (x.in_batch) {
    const Device<char> second(
        std::vector<char>(cuda::info_nce_keys_backward_workspace_bytes<Query>(shape, options, contrast), char(0xff)));
    check::cuda(cuda::info_nce_keys_backward(d_query.data(), d_key.data(), shape, options, contrast, lse.data(),
                                             weights.data(), d_upstream.data(), grad_key.data(), second.data(),
                                             cudaStream_t{}));
  }

  const auto unit_of = [](const char* type) {
    return type[0] == 'b' ? 0x1p-5 : type[5] == '1' ? 0x1p-8 : 1e-5;  // bfloat16, float16, float32
  };
  const double unit = std::max({unit_of(check::name<Query>()), unit_of(check::name<Queue>()), x.tf32 ? 0x1p-8 : 0.0});
  const Exact want =
      exact(x, values(query), values(key), values(queue), values(target), key_ids, queue_ids, values(upstream), unit);
  const auto got_loss = loss.host(), got_lse = lse.host(), got_query = grad_query.host(), got_key = grad_key.host();
  const auto got_temperature = grad_temperature.host();
  const auto got_rank = rank.host();
  double worst = 0;
  const char* of = "";
  const auto hold = [&](const char* what, double error, double bound) {
    if (x.alone && what[0] == 'g') bound = 0;
    const double share = std::isnan(error) ? INFINITY : error / (bound + 1e-30);
    if (share > worst) {
      worst = share;
      of = what;
    }
  };
  for (int64_t i = 0; i < x.n; ++i) {
    if (x.sees_nan(i)) {
      hold("loss of a row that sees NaN", std::isnan(got_loss[i]) ? 0 : NAN, 1);
      continue;
    }
    const auto difference = [](double a, double b) { return a == b ? 0 : std::abs(a - b); };  // of infinities too
    hold("loss", difference(got_loss[i], want.loss[i]), want.bound_loss[i]);
    hold("lse", difference(got_lse[i], want.lse[i]), want.bound_loss[i]);
    hold("rank", got_rank[i] < want.rank_low[i] || got_rank[i] > want.rank_high[i] ? 1e9 : 0, 1);
    hold("grad_query", distance(&got_query[i * x.c], &want.grad_query[i * x.c], x.c), want.bound_query[i]);
    hold("grad_temperature", std::abs(got_temperature[i] - want.grad_temperature[i]),
         2 * want.bound_loss[i] / x.temperature);
  }
  for (int64_t j = 0; x.has_key && j < x.m; ++j) {
    if (x.sees_nan(j)) continue;
    hold("grad_key", distance(&got_key[j * x.c], &want.grad_key[j * x.c], x.c), want.bound_key[j]);
  }
  check::that(worst <= 1, describe(x, check::name<Query>(), check::name<Queue>()) + ": " + of + " is " +
                              std::to_string(worst) + " of its tolerance");
}

template <typename Query>
void test_queue(int type, const Case& x, check::Random& random) {
  if (type == 0) return test<Query, float>(x, random);
  if (type == 1) return test<Query, __nv_bfloat16>(x, random);
  test<Query, __half>(x, random);
}

void test_types(int query, int queue, const Case& x, check::Random& random) {
  if (query == 0) return test_queue<float>(queue, x, random);
  if (query == 1) return test_queue<__nv_bfloat16>(queue, x, random);
  test_queue<__half>(queue, x, random);
}

// Row 2 does not see key 2, which may be NaN.
void test_excluded_key_that_is_not_finite(int64_t c, check::Random& random) {
  constexpr int64_t n = 6;
  const Device<float> query(check::normal<float>(random, n * c)), target(std::vector<float>(n * c));
  std::vector<float> keys = check::normal<float>(random, n * c);
  const auto gradient = [&] {
    const std::vector<float> zeros(n * c);
    const Device<float> key(keys), loss(zeros), lse(zeros), positive(zeros), grad_query(zeros), weights(zeros);
    const std::vector<int64_t> ranks(n);
    const Device<int64_t> rank(ranks);
    const cuda::InfoNceOptions options{0.2f, nullptr, 1e-12f, false, 3};
    cuda::InfoNceContrast contrast{};
    contrast.in_batch = true;
    contrast.keys = n;
    contrast.own_key = cuda::OwnKey::kExcluded;
    const cuda::InfoNceShape shape{n, 0, c};
    const cuda::InfoNceOutputs outputs{loss.data(),       lse.data(), positive.data(), rank.data(),
                                       grad_query.data(), nullptr,    nullptr,         weights.data()};
    const float* const no_queue = nullptr;
    const Device<char> workspace(
        std::vector<char>(cuda::info_nce_workspace_bytes(no_queue, shape, options, contrast, true), char(0xff)));
    check::cuda(cuda::info_nce(query.data(), key.data(), no_queue, target.data(), shape, options, contrast, outputs,
                               workspace.data(), cudaStream_t{}));
    const std::vector<float> all = grad_query.host();
    return std::vector<float>(all.begin() + 2 * c, all.begin() + 3 * c);
  };
  const std::vector<float> want = gradient();
  keys[2 * c + 1] = NAN;
  const std::vector<float> got = gradient();
  double error = 0;
  for (int64_t i = 0; i < c; ++i) error += std::abs(got[i] - want[i]);  // NaN stays
  check::that(error <= 1e-4 * double(c), "n=6 c=" + std::to_string(c) + " excluded: " + std::to_string(error));
}

// No row has a positive, so nothing has a gradient, although key 2 is NaN. summed: as the candidates of
// positives="sum", whose losses do not count.
void test_no_positive_and_a_key_that_is_not_finite(int64_t c, bool summed, check::Random& random) {
  constexpr int64_t n = 6;
  const Device<float> query(check::normal<float>(random, n * c)), target(std::vector<float>(n * c));
  std::vector<float> keys = check::normal<float>(random, n * c);
  keys[2 * c + 1] = NAN;
  const auto floats = [](int64_t count) { return Device<float>(std::vector<float>(count, NAN)); };
  const auto loss = floats(n), lse = floats(n), positive = floats(n), grad_query = floats(n * c);
  const auto grad_temperature = floats(n), weights = floats(3 * n), grad_key = floats(n * c);
  const Device<float> key(keys), upstream(std::vector<float>(n, summed ? 0.0f : 1.0f));
  const Device<int64_t> rank(std::vector<int64_t>(n, 0)), ids(std::vector<int64_t>{0, 1, 2, 3, 4, 5});
  const cuda::InfoNceOptions options{0.2f, nullptr, 1e-12f, true, 3};
  cuda::InfoNceContrast contrast{};
  contrast.in_batch = true;
  contrast.keys = n;
  contrast.own_key = cuda::OwnKey::kExcluded;
  contrast.row_ids = contrast.key_ids = summed ? nullptr : ids.data();
  contrast.same_id_positive = !summed;
  const cuda::InfoNceShape shape{n, 0, c};
  const cuda::InfoNceOutputs outputs{loss.data(),       lse.data(), positive.data(),         rank.data(),
                                     grad_query.data(), nullptr,    grad_temperature.data(), weights.data()};
  const float* const no_queue = nullptr;
  const Device<char> workspace(
      std::vector<char>(cuda::info_nce_workspace_bytes(no_queue, shape, options, contrast, true), char(0xff)));
  check::cuda(cuda::info_nce(query.data(), key.data(), no_queue, summed ? target.data() : nullptr, shape, options,
                             contrast, outputs, workspace.data(), cudaStream_t{}));
  const Device<char> second(
      std::vector<char>(cuda::info_nce_keys_backward_workspace_bytes<float>(shape, options, contrast), char(0xff)));
  check::cuda(cuda::info_nce_keys_backward(query.data(), key.data(), shape, options, contrast, lse.data(),
                                           weights.data(), upstream.data(), grad_key.data(), second.data(),
                                           cudaStream_t{}));
  const auto of_query = grad_query.host(), of_temperature = grad_temperature.host(), of_key = grad_key.host();
  bool zero = true;
  for (int64_t i = 0; i < n * c; ++i) zero = zero && (i / c == 2 || of_key[i] == 0) && (summed || of_query[i] == 0);
  for (int64_t i = 0; i < n; ++i) zero = zero && (summed || of_temperature[i] == 0);
  check::that(zero, "n=6 c=" + std::to_string(c) + " summed=" + std::to_string(summed) + ": a gradient");
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 100;
  check::Random random(argc > 2 ? atoi(argv[2]) : 20191113);
#ifdef MOCO_EMULATE
  if (argc > 3) emu::config().multiprocessors = atoi(argv[3]);
#endif
  const int64_t all_c[] = {64, 128, 256, 512, 768, 1024, 17, 96};
  check::group("everything at once, every width and type");
  for (const int64_t c : all_c) {
    for (int type = 0; type < 4; ++type) {
      for (const bool positive : {false, true}) {
        test_types(type % 3, type % 3,
                   {17, 75, c, 40, 12, 70, true, true, true, positive, true, type == 3, 20, 0.1, 0.07}, random);
      }
    }
  }
  check::group("edges");
  const Case plain{5, 70, 64, 5, 0, -1, false, false, false, false, true, false, 9, 0, 0.07};
  for (const int64_t num_valid : {0, 1, 64, 70}) {
    for (const bool on_device : {false, true}) {
      for (const int64_t c : {64, 17}) {
        Case x = plain;
        x.c = c, x.num_valid = num_valid, x.valid_on_device = on_device;
        test_types(0, 0, x, random);
        x.smoothing = 0.1;
        test_types(0, 1, x, random);
      }
    }
  }
  for (const int names : {1, 0}) {  // all have the same id; no id is known
    Case x = plain;
    x.ids = x.in_batch = true;
    x.names = names;
    for (const bool positive : {false, true}) {
      x.positive = positive;
      test_types(0, 0, x, random);
      x.smoothing = 0.5;
      test_types(2, 2, x, random);
    }
  }
  for (const int64_t c : {64, 17}) {  // masked keys that are not finite
    for (const double smoothing : {0.0, 0.3}) {
      for (const bool in_batch : {false, true}) {
        for (int type = 0; type < 3; ++type) {
          Case x = plain;
          x.c = c, x.ids = x.hidden = true, x.in_batch = in_batch, x.smoothing = smoothing;
          if (type == 0) x.queue_norm = 2000, x.temperature *= 2000;  // other keys have to be scaled
          test_types(type, type, x, random);
        }
      }
    }
  }
  for (const int64_t n : {1, 70}) {  // no queue
    Case x = plain;
    x.k = 0, x.n = n, x.m = n, x.in_batch = true;
    for (int type = 0; type < 3; ++type) test_types(type, type, x, random);
  }
  check::group("targets, and what the own key is");
  for (const int64_t c : {64, 128, 768, 17}) {
    for (int type = 0; type < 3; ++type) {
      for (const bool in_batch : {false, true}) {
        for (const bool ids : {false, true}) {
          Case x = plain;
          x.c = c, x.in_batch = in_batch, x.ids = ids;
          x.target = true;  // soft labels
          test_types(type, type, x, random);
          x.has_key = in_batch, x.own_key = in_batch ? cuda::OwnKey::kExcluded : x.own_key;  // relations
          test_types(type, 2 - type, x, random);
          x.only = ids;  // the logsumexp of positives
          test_types(type, type, x, random);
          x.only = x.target = false, x.has_key = true, x.own_key = cuda::OwnKey::kDecoupled;
          test_types(type, type, x, random);
        }
        Case x = plain;  // positives by id alone; some rows have none
        x.c = c, x.in_batch = in_batch, x.ids = x.positive = true, x.names = 40;
        x.has_key = in_batch, x.own_key = in_batch ? cuda::OwnKey::kExcluded : x.own_key;
        test_types(type, type, x, random);
      }
    }
  }
  check::group("no negatives: no gradient, to the bit");
  for (int type = 0; type < 3; ++type) {
    for (const double smoothing : {0.0, 0.84}) {
      Case x = plain;
      x.k = 0, x.n = 1, x.m = 1, x.in_batch = true, x.smoothing = smoothing, x.temperature = 0.035, x.alone = true;
      test_types(type, type, x, random);
    }
  }
  check::group("random");
  for (int i = 0; i < cases; ++i) {
    const int64_t all_n[] = {1, 3, 33, 65}, all_k[] = {1, 7, 64, 150};
    const double all_t[] = {0.02, 0.07, 1, 10};
    Case x{check::pick(random, all_n),
           check::pick(random, all_k),
           check::pick(random, all_c),
           0,
           0,
           -1,
           check::uniform(random, 0, 1) == 0,
           check::uniform(random, 0, 1) == 0,
           check::uniform(random, 0, 1) == 0,
           check::uniform(random, 0, 1) == 0,
           check::uniform(random, 0, 2) > 0,
           check::uniform(random, 0, 1) == 0,
           static_cast<int>(check::uniform(random, 1, 30)),
           check::uniform(random, 0, 1) * 0.2,
           check::pick(random, all_t)};
    x.m = x.in_batch ? x.n + check::uniform(random, 0, 40) : x.n;
    x.key_offset = check::uniform(random, 0, x.m - x.n);
    if (check::uniform(random, 0, 2) == 0) x.num_valid = check::uniform(random, 0, x.k);
    test_types(static_cast<int>(check::uniform(random, 0, 2)), static_cast<int>(check::uniform(random, 0, 2)), x,
               random);
  }
  check::group("wide rows");
  for (const int64_t c : {264, 768}) {
    for (const int64_t num_valid : {0, 33, 70}) {
      for (int type = 1; type < 3; ++type) {
#ifdef MOCO_EMULATE
        emu::config().seed += 1;  // a different schedule of threads
#endif
        Case x = plain;
        x.c = c, x.num_valid = num_valid, x.valid_on_device = true;
        test_types(0, type, x, random);
      }
    }
  }
  check::group("an excluded key that is not finite");
  for (const int64_t c : {64, 128, 17}) test_excluded_key_that_is_not_finite(c, random);
  check::group("no positive, and a key that is not finite");
  for (const int64_t c : {64, 128, 17}) {
    for (const bool summed : {false, true}) test_no_positive_and_a_key_that_is_not_finite(c, summed, random);
  }
  return check::finish();
}
