// InfoNCE against a queue: loss and gradient in one pass over the keys.
//
// The queue is cut into one slab a thread; a slab is walked in tiles small enough that a tile of logits stays in cache
// between its two GEMMs:
//   S = q @ tile^T        [N, tile]
//   P = exp2(S - max)     the epilogue, with a running maximum a row
//   sum += rowsum(P),  acc += P @ tile    [N, C]
// Slabs are then merged in fixed order, so a result depends on the number of threads but not on their timing.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numbers>
#include <vector>

#include "kernels/cpu.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/vector_loops.h"

namespace moco_ext::cpu {
namespace {

constexpr int64_t kTileElements = 128 * 1024;  // logits in a tile: half a megabyte of float32, half of a usual L2
constexpr int64_t kMaxRowBlock = 512;

// The element loops in the accumulation type: vectors for float, plain loops for the double of gradient checks.
inline RowMax max_and_count(const float* x, int64_t n, float floor, float threshold) {
  return vector_loops().max_and_count(x, n, floor, threshold);
}

inline float exp2_and_sum(float* x, int64_t n, float shift, float scale, bool store) {
  return vector_loops().exp2_and_sum(x, n, shift, scale, store);
}

struct RowMaxDouble {
  double max;
  int64_t above;
};

RowMaxDouble max_and_count(const double* x, int64_t n, double floor, double threshold) {
  RowMaxDouble result{floor, 0};
  for (int64_t i = 0; i < n; ++i) {
    result.max = x[i] > result.max ? x[i] : result.max;
    result.above += x[i] > threshold ? 1 : 0;
  }
  return result;
}

double exp2_and_sum(double* x, int64_t n, double shift, double scale, bool store) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double p = std::exp2((x[i] - shift) * scale);
    if (store) x[i] = p;
    sum += p;
  }
  return sum;
}

// Keys as the GEMM reads them: float and double queues in place, 16-bit ones widened a tile at a time.
inline const float* widen(const float* tile, int64_t, std::vector<float>&) { return tile; }
inline const double* widen(const double* tile, int64_t, std::vector<double>&) { return tile; }
template <typename T>
inline const float* widen(const T* tile, int64_t count, std::vector<float>& scratch) {
  convert_array(tile, scratch.data(), count);
  return scratch.data();
}

inline bool gemm(const Host& host, const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k,
                 bool transpose_b, bool accumulate) {
  return host.gemm_float(a, b, c, m, n, k, transpose_b, accumulate);
}
inline bool gemm(const Host& host, const double* a, const double* b, double* c, int64_t m, int64_t n, int64_t k,
                 bool transpose_b, bool accumulate) {
  return host.gemm_double(a, b, c, m, n, k, transpose_b, accumulate);
}

// What one slab of the queue contributes to every row.
template <typename A>
struct Partial {
  std::vector<A> max;          // [N] of the raw scores, at least the positive's
  std::vector<A> sum;          // [N] of exp2((score - max) * scale) over the negatives
  std::vector<A> acc;          // [N, C] of the same weights times the keys; empty without gradient
  std::vector<int64_t> above;  // [N]
  bool ok = true;
};

// The inputs all slabs share.
template <typename A>
struct Rows {
  std::vector<A> query, key;            // [N, C] in the accumulation type, unit length if so asked
  std::vector<A> query_norm, key_norm;  // [N]
  std::vector<A> positive;              // [N] query . key
};

template <typename A, typename Queue>
void walk_slab(const Host& host, const Rows<A>& rows, const Queue* queue, const InfoNceShape& shape, A scale,
               int64_t tile, int64_t key_begin, int64_t key_end, bool gradient, Partial<A>& partial) {
  const auto [n, k, c] = shape;
  partial.max = rows.positive;
  partial.sum.assign(n, A{0});
  partial.above.assign(n, 0);
  if (gradient) partial.acc.assign(n * c, A{0});
  const int64_t row_block = std::min(n, kMaxRowBlock);
  const auto scores = std::make_unique_for_overwrite<A[]>(row_block * tile);
  std::vector<A> widened(std::is_same_v<Queue, A> ? 0 : tile * c);

  for (int64_t key = key_begin; key < key_end; key += tile) {
    const int64_t keys = std::min(tile, key_end - key);
    const A* key_tile = widen(queue + key * c, keys * c, widened);
    for (int64_t row = 0; row < n; row += row_block) {
      const int64_t rows_here = std::min(row_block, n - row);
      partial.ok &= gemm(host, rows.query.data() + row * c, key_tile, scores.get(), rows_here, keys, c, true, false);
      for (int64_t r = 0; r < rows_here; ++r) {
        const int64_t i = row + r;
        A* s = scores.get() + r * keys;
        const auto [max, above] = max_and_count(s, keys, partial.max[i], rows.positive[i]);
        partial.above[i] += above;
        if (max > partial.max[i]) {
          const A shrink = std::exp2((partial.max[i] - max) * scale);
          partial.max[i] = max;
          partial.sum[i] *= shrink;
          if (gradient) {
            for (int64_t j = 0; j < c; ++j) partial.acc[i * c + j] *= shrink;
          }
        }
        partial.sum[i] += exp2_and_sum(s, keys, partial.max[i], scale, gradient);
      }
      if (gradient) {
        partial.ok &= gemm(host, scores.get(), key_tile, partial.acc.data() + row * c, rows_here, c, keys, false, true);
      }
    }
  }
}

// Merges the slabs of row i, adds the positive, and writes every output of the row.
template <typename A>
void finish_row(int64_t i, int64_t c, const Rows<A>& rows, std::vector<Partial<A>>& partials,
                const InfoNceOptions& options, A scale, const InfoNceOutputs<A>& out) {
  const A temperature = static_cast<A>(options.temperature);
  const A positive = rows.positive[i];
  A max = positive;
  for (const Partial<A>& p : partials) max = std::max(max, p.max[i]);
  A sum = 0;
  int64_t above = 0;
  for (Partial<A>& p : partials) {
    const A weight = std::exp2((p.max[i] - max) * scale);
    sum += p.sum[i] * weight;
    above += p.above[i];
    p.max[i] = weight;  // what acc of this slab is to be scaled by
  }
  // Relative to the positive, so that a small loss is not the difference of two large numbers.
  const A positive_weight = std::exp2((positive - max) * scale);
  const A loss = max > positive ? (max - positive) / temperature + std::log(sum + positive_weight) : std::log1p(sum);
  out.loss[i] = loss;
  out.positive_logit[i] = positive / temperature;
  out.lse[i] = loss + positive / temperature;
  out.rank[i] = above;
  if (out.grad_query == nullptr && out.grad_key == nullptr) return;

  const A total = sum + positive_weight;
  const A negative_mass = sum / total;  // 1 - p of the positive, without cancellation
  const A* query = rows.query.data() + i * c;
  const A* key = rows.key.data() + i * c;
  if (out.grad_query != nullptr) {
    A* g = out.grad_query + i * c;
    std::fill(g, g + c, A{0});
    for (const Partial<A>& p : partials) {
      const A weight = p.max[i] / total;
      for (int64_t j = 0; j < c; ++j) g[j] += weight * p.acc[i * c + j];
    }
    if (out.grad_temperature != nullptr) {
      const A expected = dot(query, g, c) - negative_mass * positive;  // sum of p * (score - positive)
      out.grad_temperature[i] = -expected / (temperature * temperature);
    }
    for (int64_t j = 0; j < c; ++j) g[j] = (g[j] - negative_mass * key[j]) / temperature;
    if (options.normalize) normalize_backward(query, rows.query_norm[i], static_cast<A>(options.eps), g, c);
  }
  if (out.grad_key != nullptr) {
    A* g = out.grad_key + i * c;
    for (int64_t j = 0; j < c; ++j) g[j] = -negative_mass * query[j] / temperature;
    if (options.normalize) normalize_backward(key, rows.key_norm[i], static_cast<A>(options.eps), g, c);
  }
}

}  // namespace

template <typename Query, typename Queue>
bool info_nce(const Host& host, const Query* query, const Query* key, const Queue* queue, const InfoNceShape& shape,
              const InfoNceOptions& options, const InfoNceOutputs<accumulate_t<Queue>>& outputs) {
  using A = accumulate_t<Queue>;
  const auto [n, k, c] = shape;
  if (n == 0) return true;
  const A scale = static_cast<A>(std::numbers::log2e / options.temperature);

  Rows<A> rows{std::vector<A>(n * c), std::vector<A>(n * c), std::vector<A>(n), std::vector<A>(n), std::vector<A>(n)};
  for (int64_t i = 0; i < n; ++i) {
    A* q = rows.query.data() + i * c;
    A* p = rows.key.data() + i * c;
    rows.query_norm[i] = load_row(query + i * c, q, c, options.normalize, static_cast<A>(options.eps));
    rows.key_norm[i] = load_row(key + i * c, p, c, options.normalize, static_cast<A>(options.eps));
    rows.positive[i] = dot(q, p, c);
  }

  const int64_t row_block = std::min(n, kMaxRowBlock);
  const int64_t tile = std::clamp<int64_t>(kTileElements / row_block / 64 * 64, 256, 4096);
  const int64_t tiles = (k + tile - 1) / tile;
  const int64_t slabs = std::clamp<int64_t>(tiles, 1, host.threads);
  std::vector<Partial<A>> partials(slabs);
  host.parallel_for(slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slab = begin; slab < end; ++slab) {
      walk_slab(host, rows, queue, shape, scale, tile, slab * tiles / slabs * tile,
                std::min(k, (slab + 1) * tiles / slabs * tile), outputs.grad_query != nullptr, partials[slab]);
    }
  });
  for (int64_t i = 0; i < n; ++i) finish_row(i, c, rows, partials, options, scale, outputs);
  return std::all_of(partials.begin(), partials.end(), [](const Partial<A>& p) { return p.ok; });
}

#define MOCO_INFO_NCE(Query, Queue)                                                                  \
  template bool info_nce(const Host&, const Query*, const Query*, const Queue*, const InfoNceShape&, \
                         const InfoNceOptions&, const InfoNceOutputs<accumulate_t<Queue>>&);
#define MOCO_INFO_NCE_QUEUES(Query) \
  MOCO_INFO_NCE(Query, float) MOCO_INFO_NCE(Query, bfloat16) MOCO_INFO_NCE(Query, float16)
MOCO_INFO_NCE_QUEUES(float)
MOCO_INFO_NCE_QUEUES(bfloat16)
MOCO_INFO_NCE_QUEUES(float16)
MOCO_INFO_NCE(double, double)

}  // namespace moco_ext::cpu
