// InfoNCE: loss and gradient in one pass over the keys.
//
// The keys are cut into one slab a thread; a slab is walked in tiles small enough that a tile of logits stays in cache
// between its two products:
//   S = tile @ panel            [keys, rows], rows of queries side by side in a vector's lanes
//   P = exp2(S - max)           with a running maximum a row
//   sum += P,  acc += tile^T @ P    [C, rows]
// Slabs are then merged in fixed order, so a result depends on the number of threads but not on their timing.
//
// A loss other than the plain one differs from it by a vector a row only, the target, of which nothing is relative to a
// maximum: loss = logsumexp(q . n / T) - q . target / T, with target = sum of w n over the keys that have a weight w in
// the cross-entropy's target distribution. So it is given, or gathered on the way, and finish_row puts it in the key's
// place.
#include <cmath>
#include <numbers>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>

#include "kernels/cpu/info_nce_rows.h"

namespace moco_ext::cpu {
namespace {

constexpr int64_t kSlabWork = 1 << 21;  // multiplications worth waking a thread for

// The inputs all slabs share.
template <typename A>
struct Problem {
  Panels panels;
  int64_t n, c, tile;  // tile: keys of one
  const UnitRows<A>& query;
  const UnitRows<A>& key;
  const A* target;                  // [N, C] or null
  const AlignedArray<A>& packed;    // the queries in panels
  const AlignedArray<A>& positive;  // [padded N] of query . anchor
  A scale;                          // from a score to the exponent of 2
  const RowsById* by_id;            // or null
  const InfoNceContrast& contrast;

  bool has_own_key() const { return !key.data.empty() && contrast.own_key != OwnKey::kExcluded; }
  bool own_is_candidate() const { return has_own_key() && contrast.own_key == OwnKey::kPositive; }
  // What row i's scores are compared with: its key, else its target, else null for a score of 0.
  const A* anchor(int64_t i) const {
    return has_own_key() ? key.row(contrast.key_offset + i) : target == nullptr ? nullptr : target + i * c;
  }
};

// What one slab of the keys contributes to every row.
template <typename A>
struct Partial {
  AlignedArray<A> max;             // [padded N] of the raw scores, at least the positive's if it is a candidate
  AlignedArray<A> sum;             // [padded N] of exp2((score - max) * scale) over the negatives
  AlignedArray<count_t<A>> above;  // [padded N]
  AlignedArray<A> acc;             // panels [C, width] of the same weights times the keys; none without gradient
  std::vector<double> column_sum;  // [C] of the slab's keys, for label smoothing
  std::vector<int64_t> matches;    // [N] keys with the row's id
  std::vector<A> match_sum;        // [N, C] their sum, where it is wanted

  Partial(const Problem<A>& p, bool gradient)
      : max(p.panels.padded()),
        sum(p.panels.padded(), A{0}),
        above(p.panels.padded(), count_t<A>{0}),
        acc(gradient ? AlignedArray<A>(p.panels.padded() * p.c, A{0}) : AlignedArray<A>()) {
    if (p.own_is_candidate()) {
      std::copy(p.positive.get(), p.positive.get() + p.panels.padded(), max.get());
    } else {
      std::fill_n(max.get(), p.panels.padded(), std::numeric_limits<A>::lowest());
    }
    if (p.contrast.label_smoothing > 0) column_sum.assign(p.c, 0.0);
    if (p.by_id != nullptr) {
      matches.assign(p.n, 0);
      if (p.contrast.same_id_positive || p.contrast.label_smoothing > 0) match_sum.assign(p.n * p.c, A{0});
    }
  }
};

template <typename A>
bool all_finite(const A* x, int64_t n) {
  return std::all_of(x, x + n, [](A value) { return std::isfinite(value); });
}

// Walks keys [begin, end) of one source: the queue, or the batch's own keys, where key `key_offset` + i is row i's
// positive.
template <typename A, typename Key>
void walk(const Problem<A>& p, const Key* keys, const int64_t* ids, std::optional<int64_t> key_offset, int64_t begin,
          int64_t end, Partial<A>& partial) {
  const int64_t n = p.n, c = p.c;
  const TileLoops<A>& loops = tile_loops<A>();
  const AlignedArray<A> widened(std::is_same_v<Key, A> ? 0 : p.tile * c);
  const AlignedArray<A> scores(p.tile * p.panels.width(0));
  struct Match {
    int64_t row, key;
    bool is_positive;
  };
  std::vector<std::vector<Match>> matches(ids == nullptr && !key_offset ? 0 : p.panels.count());  // of a tile, by panel
  // Keys of the tile that are not finite and masked out of some row. A weight of 0 would not keep NaN out of that row's
  // sums, so they are summed as 0, and the rows that do see them become NaN.
  std::vector<int64_t> hidden;
  std::vector<A> visible;
  const bool only = p.contrast.same_id_only;
  std::vector<A> kept;  // scores of a panel's matches, where only they count

  for (int64_t first = begin; first < end; first += p.tile) {
    const int64_t count = std::min(p.tile, end - first);
    const A* tile = widen(keys + first * c, count * c, widened.get());
    for (auto& of_panel : matches) of_panel.clear();
    hidden.clear();
    for (int64_t j = 0; only && j < count; ++j) {
      if (!all_finite(tile + j * c, c)) hidden.push_back(j);
    }
    for (int64_t j = 0; (key_offset || ids != nullptr) && j < count; ++j) {
      const int64_t own = key_offset ? first + j - *key_offset : -1;  // the row that this is the own key of
      bool masked = false;
      if (own >= 0 && own < n) {
        matches[own / kPanelWidth].push_back({own, j, true});
        masked = p.contrast.own_key != OwnKey::kPositive;
      }
      if (ids != nullptr) {
        p.by_id->for_each(ids[first + j], [&](int64_t row) {
          if (row == own) return;
          matches[row / kPanelWidth].push_back({row, j, false});
          masked |= !p.contrast.same_id_positive;
        });
      }
      if (masked && !only && !all_finite(tile + j * c, c)) hidden.push_back(j);
    }
    const A* summed = tile;
    if (!hidden.empty()) {
      visible.assign(tile, tile + count * c);
      for (const int64_t j : hidden) std::fill_n(visible.begin() + j * c, c, A{0});
      summed = visible.data();
    }
    for (const auto& of_panel : matches) {
      for (const auto [row, j, is_positive] : of_panel) {
        if (is_positive) continue;
        ++partial.matches[row];
        if (partial.match_sum.empty()) continue;
        for (int64_t f = 0; f < c; ++f) partial.match_sum[row * c + f] += summed[j * c + f];
      }
    }
    for (int64_t j = 0; !partial.column_sum.empty() && j < count; ++j) {
      for (int64_t f = 0; f < c; ++f) partial.column_sum[f] += summed[j * c + f];
    }

    for (int64_t panel = 0; panel < p.panels.count(); ++panel) {
      const int64_t at = p.panels.first(panel);
      const int64_t width = p.panels.width(panel);
      loops.scores(tile, p.packed.get() + at * c, scores.get(), count, c, width);
      if (only) {
        kept.clear();
        for (const auto [row, j, is_positive] : matches[panel]) kept.push_back(scores[j * width + row - at]);
        std::fill_n(scores.get(), count * width, -std::numeric_limits<A>::infinity());
        for (size_t i = 0; i < kept.size(); ++i) {
          const auto [row, j, is_positive] = matches[panel][i];
          if (!is_positive) scores[j * width + row - at] = kept[i];
        }
      }
      for (size_t i = 0; !only && !matches.empty() && i < matches[panel].size(); ++i) {
        const auto [row, j, is_positive] = matches[panel][i];
        A& score = scores[j * width + row - at];
        if (is_positive || !p.contrast.same_id_positive) {
          score = -std::numeric_limits<A>::infinity();
        } else if (score > p.positive[row]) {
          --partial.above[row];
        }
      }
      A* const acc = partial.acc.get() == nullptr ? nullptr : partial.acc.get() + at * c;
      loops.softmax(
          scores.get(), count, c, width, p.scale,
          {p.positive.get() + at, partial.max.get() + at, partial.sum.get() + at, partial.above.get() + at, acc});
      if (acc != nullptr) loops.accumulate(summed, scores.get(), acc, count, c, width);
      for (const int64_t j : hidden) {
        for (int64_t row = at; row < std::min(at + width, n); ++row) {
          if (key_offset && row == first + j - *key_offset) continue;
          const bool same = ids != nullptr && ids[first + j] >= 0 && p.contrast.row_ids[row] == ids[first + j];
          if (only ? same : !same || p.contrast.same_id_positive) {
            partial.sum[row] = std::numeric_limits<A>::quiet_NaN();
          }
        }
      }
    }
  }
}

// What all slabs say together of the cross-entropy's target distribution.
template <typename A>
struct Target {
  int64_t candidates;              // keys besides a row's positive, before masking
  std::vector<double> column_sum;  // [C] over all keys, a row's own in-batch key included
  const std::vector<Partial<A>>& partials;

  Target(const Problem<A>& p, const std::vector<Partial<A>>& slabs, int64_t queue_keys)
      : candidates(queue_keys + (p.contrast.in_batch ? p.contrast.keys - 1 : 0)),
        column_sum(slabs[0].column_sum.size()),
        partials(slabs) {
    for (const Partial<A>& slab : slabs) {
      for (size_t f = 0; f < column_sum.size(); ++f) column_sum[f] += slab.column_sum[f];
    }
  }

  // target [C] of row i; returns its share of each positive, and of each class. Without a positive, the share is 0.
  std::pair<A, A> row(const Problem<A>& p, int64_t i, A* target) const {
    const auto& x = p.contrast;
    const bool own = p.has_own_key();
    const A* key = own ? p.anchor(i) : nullptr;
    int64_t matches = 0;
    std::vector<A> match_sum(partials[0].match_sum.empty() ? 0 : p.c);
    for (const Partial<A>& slab : partials) {
      if (p.by_id != nullptr) matches += slab.matches[i];
      for (size_t f = 0; f < match_sum.size(); ++f) match_sum[f] += slab.match_sum[i * p.c + f];
    }
    const int64_t positives = (own ? 1 : 0) + (x.same_id_positive ? matches : 0);
    const int64_t classes = 1 + candidates - (x.same_id_positive ? 0 : matches);
    if (positives == 0) {
      std::fill_n(target, p.c, A{0});
      return {A{0}, A{0}};
    }
    // A positive without negatives has the whole target, exactly: its gradient is 0, and a rounding error of 1e-8 would
    // be infinite after the division by a tiny norm.
    const double share = own && classes == 1 ? 1 : (1 - x.label_smoothing) / static_cast<double>(positives);
    const double floor = own && classes == 1 ? 0 : x.label_smoothing / static_cast<double>(classes);
    for (int64_t f = 0; f < p.c; ++f) {
      const double matched = match_sum.empty() ? 0 : match_sum[f];
      const double k = own ? key[f] : 0;
      double all = 0;
      if (!column_sum.empty()) {
        all = column_sum[f] + (x.in_batch ? 0 : k) - (x.same_id_positive ? 0 : matched);
      }
      target[f] = static_cast<A>(share * (k + (x.same_id_positive ? matched : 0)) + floor * all);
    }
    return {static_cast<A>(share), static_cast<A>(floor)};
  }
};

// Merges the slabs of row i, adds its own key, and writes every output of the row. scratch [2, C]
template <typename A>
void finish_row(int64_t i, const Problem<A>& p, const std::vector<Partial<A>>& partials, const Target<A>* targets,
                const InfoNceOptions& options, A* scratch, const InfoNceOutputs<A>& out) {
  const int64_t c = p.c;
  const A temperature = static_cast<A>(options.temperature);
  const A row_weight = out.reduction == Reduction::kMean ? A{1} / static_cast<A>(p.n) : A{1};
  const A eps = static_cast<A>(options.eps);
  const A positive = p.positive[i];
  const A* query = p.query.row(i);
  const A* anchor = p.anchor(i);
  const bool candidate = p.own_is_candidate();
  A max = candidate ? positive : std::numeric_limits<A>::lowest();
  for (const Partial<A>& slab : partials) max = std::max(max, slab.max[i]);
  const auto slab_weight = [&](const Partial<A>& slab) { return std::exp2((slab.max[i] - max) * p.scale); };
  A sum = 0;
  int64_t above = 0;
  for (const Partial<A>& slab : partials) {
    sum += slab.sum[i] * slab_weight(slab);
    above += slab.above[i];
  }
  // Relative to the anchor, so that a small loss is not the difference of two large numbers.
  const A own_weight = candidate ? std::exp2((positive - max) * p.scale) : A{0};
  const A plain_loss =
      !candidate || max > positive ? (max - positive) / temperature + std::log(sum + own_weight) : std::log1p(sum);
  out.lse[i] = plain_loss + positive / temperature;
  out.rank[i] = anchor == nullptr ? -1 : above;

  // The target: the anchor, of weight 1, unless asked for another. `rest` is the own key's weight in the target less
  // its probability.
  const A total = sum + own_weight;
  const A own_probability = total == 0 ? 0 : own_weight / total;
  A rest = total == 0 ? 1 : sum / total;  // 1 - p, without cancellation
  const A* target = anchor;
  A share = 1, floor = 0;  // of each positive, and of each class
  if (targets != nullptr) {
    std::tie(share, floor) = targets->row(p, i, scratch);
    rest -= 1 - (share + floor);
    target = scratch;
  } else if (p.target != nullptr && p.has_own_key()) {
    rest = -own_probability;
    target = p.target + i * c;
  }
  if (out.weights != nullptr) {
    out.weights[3 * i] = total == 0 ? 0 : share;
    out.weights[3 * i + 1] = floor;
    out.weights[3 * i + 2] = p.has_own_key() ? -rest : 0;
  }
  const bool has_positive = share > 0;
  const A target_score = target == anchor ? positive : dot(query, target, c);
  out.positive_logit[i] = (anchor == nullptr ? target_score : positive) / temperature;
  out.loss[i] = has_positive ? plain_loss + (positive - target_score) / temperature : 0;
  if (!has_positive) {  // no gradient: a weight of 0 would not keep NaN out
    if (out.grad_query != nullptr) std::fill_n(out.grad_query + i * c, c, A{0});
    if (out.grad_temperature != nullptr) out.grad_temperature[i] = 0;
    return;
  }

  if (out.grad_query != nullptr) {
    A* const expected = scratch + c;  // sum of p n over the negatives
    std::fill(expected, expected + c, A{0});
    for (const Partial<A>& slab : partials) {
      const A weight = total == 0 ? 0 : slab_weight(slab) / total;  // without a candidate the loss is -inf
      const A* const acc = slab.acc.get() + p.panels.at(i, 0, c);
      const int64_t stride = p.panels.width(i / kPanelWidth);
      for (int64_t f = 0; f < c; ++f) expected[f] += weight * acc[f * stride];
    }
    A* g = out.grad_query + i * c;
    for (int64_t f = 0; f < c; ++f) {
      // One expression a case, so that the plain one does not take the key's probability from 1.
      g[f] = (target == anchor ? expected[f] - rest * anchor[f]
                               : expected[f] + (candidate ? own_probability * anchor[f] : 0) - target[f]) /
             temperature;
    }
    if (out.grad_temperature != nullptr) out.grad_temperature[i] = -dot(query, g, c) / temperature * row_weight;
    if (options.normalize) normalize_backward(query, p.query.norm[i], eps, g, c);
    for (int64_t f = 0; row_weight != 1 && f < c; ++f) g[f] *= row_weight;
  }
  if (out.grad_key != nullptr) {
    A* g = out.grad_key + i * c;
    for (int64_t f = 0; f < c; ++f) g[f] = -rest * query[f] / temperature;
    if (options.normalize) normalize_backward(anchor, p.key.norm[i], eps, g, c);
    for (int64_t f = 0; row_weight != 1 && f < c; ++f) g[f] *= row_weight;
  }
}

// The rows' results -> `out`, in a fixed order.
template <typename A>
void reduce(const InfoNceOutputs<A>& rows, int64_t n, const InfoNceOutputs<A>& out) {
  if (out.reduction == Reduction::kNone) {
    if (out.reduced != nullptr) std::copy(rows.loss, rows.loss + n, out.reduced);
    return;
  }
  const auto sum = [n](const A* x) { return std::accumulate(x, x + n, 0.0); };
  const double total = sum(rows.loss);
  *out.reduced = static_cast<A>(out.reduction == Reduction::kMean ? total / static_cast<double>(n) : total);
  if (out.grad_temperature != nullptr) *out.grad_temperature = static_cast<A>(sum(rows.grad_temperature));
}

}  // namespace

template <typename Query, typename Queue>
void info_nce(const Host& host, const Query* query, const Query* key, const Queue* queue,
              const accumulate_t<Queue>* target, const InfoNceShape& shape, const InfoNceOptions& options,
              const InfoNceContrast& contrast, const InfoNceOutputs<accumulate_t<Queue>>& outputs) {
  using A = accumulate_t<Queue>;
  const int64_t n = shape.n, k = shape.k, c = shape.c;  // Clang 15 and older cannot capture structured bindings
  InfoNceOutputs<A> rows = outputs;
  std::vector<A> grad_temperature;
  if (outputs.reduction != Reduction::kNone && outputs.grad_temperature != nullptr) {
    grad_temperature.resize(n);
    rows.grad_temperature = grad_temperature.data();
  }
  if (n == 0) return reduce(rows, n, outputs);  // the mean is NaN
  const int64_t key_rows = key == nullptr ? 0 : contrast.keys;
  const UnitRows<A> queries(host, query, n, c, options);
  const UnitRows<A> keys(host, key, key_rows, c, options);
  const Panels panels{n};
  const AlignedArray<A> packed = panels.pack(queries.data.data(), c);
  const AlignedArray<A> positive(panels.padded(), A{0});
  std::optional<RowsById> by_id;
  if (contrast.row_ids != nullptr) by_id.emplace(contrast.row_ids, n);
  const Problem<A> problem{panels,
                           n,
                           c,
                           tile_keys(panels.width(0), c),
                           queries,
                           keys,
                           target,
                           packed,
                           positive,
                           static_cast<A>(std::numbers::log2e / options.temperature),
                           by_id ? &*by_id : nullptr,
                           contrast};
  for (int64_t i = 0; i < n; ++i) {
    if (const A* const anchor = problem.anchor(i)) positive[i] = dot(queries.row(i), anchor, c);
  }

  const int64_t batch_keys = contrast.in_batch ? key_rows : 0;
  const auto tiles = [&](int64_t count) { return (count + problem.tile - 1) / problem.tile; };
  const int64_t worth = panels.padded() * (k + batch_keys) * c / kSlabWork;
  const int64_t slabs = std::max<int64_t>(1, std::min({host.threads, tiles(k) + tiles(batch_keys), worth}));
  std::vector<Partial<A>> partials;
  partials.reserve(slabs);
  for (int64_t i = 0; i < slabs; ++i) partials.emplace_back(problem, outputs.grad_query != nullptr);
  const auto range = [&](int64_t count, int64_t slab) {
    const auto edge = [&](int64_t s) { return std::min(count, s * tiles(count) / slabs * problem.tile); };
    return std::pair{edge(slab), edge(slab + 1)};
  };
  host.parallel_for(slabs, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushSubnormals flush;
    for (int64_t slab = begin; slab < end; ++slab) {
      const auto [first, last] = range(k, slab);
      walk(problem, queue, contrast.queue_ids, std::nullopt, first, last, partials[slab]);
      if (!contrast.in_batch) continue;
      const auto [first_key, last_key] = range(batch_keys, slab);
      walk(problem, keys.data.data(), contrast.key_ids, contrast.key_offset, first_key, last_key, partials[slab]);
    }
  });

  // Not for a target that is given.
  const bool plain = (!by_id && contrast.label_smoothing == 0) || target != nullptr;
  std::optional<Target<A>> targets;
  if (!plain) targets.emplace(problem, partials, k);
  host.parallel_for(n, 1 + kRowWork / c, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushSubnormals flush;
    std::vector<A> scratch(2 * c);
    for (int64_t i = begin; i < end; ++i) {
      finish_row(i, problem, partials, plain ? nullptr : &*targets, options, scratch.data(), rows);
    }
  });
  reduce(rows, n, outputs);
}

#define MOCO_INFO_NCE(Query, Queue)                                                                         \
  template void info_nce(const Host&, const Query*, const Query*, const Queue*, const accumulate_t<Queue>*, \
                         const InfoNceShape&, const InfoNceOptions&, const InfoNceContrast&,                \
                         const InfoNceOutputs<accumulate_t<Queue>>&);
#define MOCO_INFO_NCE_QUEUES(Query) \
  MOCO_INFO_NCE(Query, float) MOCO_INFO_NCE(Query, bfloat16) MOCO_INFO_NCE(Query, float16)
MOCO_INFO_NCE_QUEUES(float)
MOCO_INFO_NCE_QUEUES(bfloat16)
MOCO_INFO_NCE_QUEUES(float16)
MOCO_INFO_NCE(double, double)

}  // namespace moco_ext::cpu
