// The keys with the highest scores of each query, without the scores of all keys.
//
// The keys are cut into slabs and walked in tiles, as in info_nce.cpp. The worst of a row's k best keys so far is a
// threshold. Few tiles have a score above it, and only those are looked at score by score.
#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/cpu/info_nce_rows.h"

namespace moco_ext::cpu {
namespace {

constexpr int64_t kSlabWork = 1 << 21;  // multiplications worth waking a thread for
constexpr int64_t kPanelsOfThread = 8;
constexpr int64_t kTasksOfThread = 4;

template <typename A>
struct Entry {
  A score;
  int64_t key;
};

// Higher scores first, equal ones by key. NaN comes before all numbers, so that it is seen.
struct ComesBefore {
  template <typename A>
  bool operator()(const Entry<A>& a, const Entry<A>& b) const {
    if (a.score > b.score) return true;
    if (a.score < b.score) return false;
    const bool nan = std::isnan(a.score);
    return nan != std::isnan(b.score) ? nan : a.key < b.key;
  }
};

// The first k of the entries seen so far, and up to k others.
template <typename A>
class Best {
 public:
  explicit Best(int64_t k) : k_(k), threshold_(std::numeric_limits<A>::quiet_NaN()) {}

  // No score up to it enters: k entries come before, with lower keys. At first NaN, which none is up to.
  A threshold() const { return threshold_; }

  // Keys come in order.
  void add(const Entry<A>& entry) {
    entries_.push_back(entry);
    if (static_cast<int64_t>(entries_.size()) < 2 * k_) return;
    std::nth_element(entries_.begin(), entries_.begin() + (k_ - 1), entries_.end(), ComesBefore{});
    entries_.resize(k_);
    threshold_ = entries_.back().score;
  }
  const std::vector<Entry<A>>& entries() const { return entries_; }

 private:
  int64_t k_;
  A threshold_;
  std::vector<Entry<A>> entries_;
};

// Panels [first_panel, end_panel) with keys [begin, end). best: of each row
template <typename A, typename Key>
void walk(const Panels& panels, const A* packed, const Key* keys, int64_t c, int64_t tile_size, int64_t first_panel,
          int64_t end_panel, int64_t begin, int64_t end, Best<A>* best) {
  const TileLoops<A>& loops = tile_loops<A>();
  const AlignedArray<A> widened(std::is_same_v<Key, A> ? 0 : tile_size * c);
  const AlignedArray<A> scores(tile_size * panels.width(0));
  const int64_t first_row = panels.first(first_panel);
  AlignedArray<A> threshold(panels.first(end_panel) - first_row);
  const AlignedArray<count_t<A>> found(kPanelWidth);
  for (int64_t row = first_row; row < panels.first(end_panel); ++row) {
    threshold[row - first_row] = row < panels.n ? best[row].threshold() : std::numeric_limits<A>::infinity();
  }
  for (int64_t first = begin; first < end; first += tile_size) {
    const int64_t count = std::min(tile_size, end - first);
    const A* const tile = widen(keys + first * c, count * c, widened.get());
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const int64_t at = panels.first(panel);
      const int64_t width = panels.width(panel);
      loops.scores(tile, packed + at * c, scores.get(), count, c, width);
      loops.any_above(scores.get(), count, width, &threshold[at - first_row], found.get());
      for (int64_t row = at; row < std::min(at + width, panels.n); ++row) {
        if (found[row - at] == 0) continue;
        A& limit = threshold[row - first_row];
        for (int64_t j = 0; j < count; ++j) {
          const A score = scores[j * width + row - at];
          if (score <= limit) continue;
          best[row].add({score, first + j});
          limit = best[row].threshold();
        }
      }
    }
  }
}

}  // namespace

template <typename Query, typename Queue>
void nearest_keys(const Host& host, const Query* query, const Queue* queue, const InfoNceShape& shape, int64_t k,
                  bool normalize, double eps, accumulate_t<Queue>* similarity, int64_t* index) {
  using A = accumulate_t<Queue>;
  const int64_t n = shape.n, keys = shape.k, c = shape.c;  // Clang 15 and older cannot capture structured bindings
  if (n == 0) return;
  const UnitRows<A> queries(host, query, n, c, {1.0, eps, normalize});
  const Panels panels{n};
  const AlignedArray<A> packed = panels.pack(queries.data.data(), c);
  const int64_t tile_size = tile_keys(panels.width(0), c);
  const int64_t tiles = (keys + tile_size - 1) / tile_size;

  // Threads divide the keys, or many queries: each slab of the keys keeps the best ones of all its rows.
  const bool by_query = panels.count() > kPanelsOfThread * host.threads;
  const int64_t groups = by_query ? kTasksOfThread * host.threads : 1;
  const int64_t worth = panels.padded() * keys * c / kSlabWork;
  const int64_t slabs = by_query ? 1 : std::max<int64_t>(1, std::min({host.threads, tiles, worth}));
  std::vector<std::vector<Best<A>>> best(slabs, std::vector<Best<A>>(n, Best<A>(std::min(k, keys))));
  host.parallel_for(slabs * groups, 1, [&](int64_t first_task, int64_t end_task) {
    for (int64_t task = first_task; task < end_task; ++task) {
      const int64_t slab = task / groups;
      const int64_t group = task % groups;
      const auto edge = [&](int64_t s) { return std::min(keys, s * tiles / slabs * tile_size); };
      walk(panels, packed.get(), queue, c, tile_size, group * panels.count() / groups,
           (group + 1) * panels.count() / groups, edge(slab), edge(slab + 1), best[slab].data());
    }
  });
  host.parallel_for(n, 1 + kRowWork / (k * slabs), [&](int64_t begin, int64_t end) {
    std::vector<Entry<A>> all;
    for (int64_t i = begin; i < end; ++i) {
      all.clear();
      for (const auto& slab : best) all.insert(all.end(), slab[i].entries().begin(), slab[i].entries().end());
      const int64_t found = std::min<int64_t>(k, static_cast<int64_t>(all.size()));
      if (found > 0) std::nth_element(all.begin(), all.begin() + (found - 1), all.end(), ComesBefore{});
      std::sort(all.begin(), all.begin() + found, ComesBefore{});
      for (int64_t j = 0; j < k; ++j) {
        similarity[i * k + j] = j < found ? all[j].score : -std::numeric_limits<A>::infinity();
        index[i * k + j] = j < found ? all[j].key : -1;
      }
    }
  });
}

#define MOCO_NEAREST_KEYS(Query, Queue)                                                                           \
  template void nearest_keys(const Host&, const Query*, const Queue*, const InfoNceShape&, int64_t, bool, double, \
                             accumulate_t<Queue>*, int64_t*);
#define MOCO_NEAREST_KEYS_QUEUES(Query) \
  MOCO_NEAREST_KEYS(Query, float) MOCO_NEAREST_KEYS(Query, bfloat16) MOCO_NEAREST_KEYS(Query, float16)
MOCO_NEAREST_KEYS_QUEUES(float)
MOCO_NEAREST_KEYS_QUEUES(bfloat16)
MOCO_NEAREST_KEYS_QUEUES(float16)
MOCO_NEAREST_KEYS(double, double)

}  // namespace moco_ext::cpu
