// The gradient of keys that are negatives of one another's queries: the pass of info_nce.cpp with the roles of the two
// sides exchanged. A row's logsumexp is known by now, so there is no maximum to keep, and no slabs to merge: each
// thread owns panels of key rows and walks all queries.
#include <cmath>
#include <limits>
#include <numbers>
#include <optional>

#include "kernels/cpu/info_nce_rows.h"

namespace moco_ext::cpu {

template <typename Query>
void info_nce_keys_backward(const Host& host, const Query* query, const Query* key, const InfoNceShape& shape,
                            const InfoNceOptions& options, const InfoNceContrast& contrast,
                            const accumulate_t<Query>* lse, const accumulate_t<Query>* weights,
                            const accumulate_t<Query>* grad_loss, accumulate_t<Query>* grad_key) {
  using A = accumulate_t<Query>;
  const int64_t n = shape.n;
  const int64_t c = shape.c;
  const int64_t m = contrast.keys;
  const UnitRows<A> queries(host, query, n, c, options);
  const UnitRows<A> keys(host, key, m, c, options);
  const Panels panels{m};
  const AlignedArray<A> packed = panels.pack(keys.data.data(), c);
  const TileLoops<A>& loops = tile_loops<A>();
  const A temperature = static_cast<A>(options.temperature);
  const A scale = static_cast<A>(std::numbers::log2e / options.temperature);
  std::vector<A> shift(n), floor(n), upstream(n);
  for (int64_t i = 0; i < n; ++i) {
    // A row without a loss, or whose loss does not count, and perhaps with an lse of -inf or NaN.
    const bool lost = weights[3 * i] == 0 || grad_loss[i] == 0;
    upstream[i] = lost ? 0 : grad_loss[i];
    shift[i] = lost ? std::numeric_limits<A>::infinity() : lse[i] * temperature;
    floor[i] = weights[3 * i + 1];
  }
  std::optional<RowsById> by_id;
  if (contrast.row_ids != nullptr) by_id.emplace(contrast.row_ids, n);

  host.parallel_for(panels.count(), 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushSubnormals flush;
    const AlignedArray<A> scores(kMinTileKeys * kPanelWidth);
    const AlignedArray<A> acc(c * kPanelWidth);
    std::vector<A> gradient(c);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t at = panels.first(panel);
      const int64_t width = panels.width(panel);
      std::fill(acc.get(), acc.get() + c * width, A{0});
      for (int64_t row = 0; row < n; row += kMinTileKeys) {
        const int64_t count = std::min(kMinTileKeys, n - row);
        const auto in_tile = [&](int64_t i) { return i >= row && i < row + count; };
        loops.scores(queries.row(row), packed.get() + at * c, scores.get(), count, c, width);
        loops.weigh(scores.get(), count, width, scale, shift.data() + row, floor.data() + row, upstream.data() + row);
        for (int64_t j = at; j < std::min(at + width, m); ++j) {
          const auto share = [&](int64_t i) { return upstream[i] * weights[3 * i]; };
          const auto score = [&](int64_t i) -> A& { return scores[(i - row) * width + j - at]; };
          const int64_t own_row = j - contrast.key_offset;  // the row whose positive this key is
          if (in_tile(own_row)) score(own_row) = upstream[own_row] * weights[3 * own_row + 2];  // without cancellation
          if (!by_id) continue;
          for (int64_t i = row; contrast.same_id_only && i < row + count; ++i) {
            const bool same = contrast.key_ids[j] >= 0 && contrast.row_ids[i] == contrast.key_ids[j];
            if (i != own_row && !same) score(i) = 0;
          }
          if (contrast.same_id_only) continue;
          by_id->for_each(contrast.key_ids[j], [&](int64_t i) {
            if (i == own_row || !in_tile(i)) return;
            if (contrast.same_id_positive) {
              score(i) -= share(i);
            } else {
              score(i) = 0;
            }
          });
        }
        loops.accumulate(queries.row(row), scores.get(), acc.get(), count, c, width);
      }
      for (int64_t j = at; j < std::min(at + width, m); ++j) {
        A* const g = grad_key + j * c;
        for (int64_t f = 0; f < c; ++f) g[f] = acc[f * width + j - at] / temperature;
        if (options.normalize) normalize_backward(keys.row(j), keys.norm[j], static_cast<A>(options.eps), g, c);
      }
    }
  });
}

#define MOCO_INFO_NCE_KEYS(Query)                                                                                 \
  template void info_nce_keys_backward(const Host&, const Query*, const Query*, const InfoNceShape&,              \
                                       const InfoNceOptions&, const InfoNceContrast&, const accumulate_t<Query>*, \
                                       const accumulate_t<Query>*, const accumulate_t<Query>*, accumulate_t<Query>*);
MOCO_INFO_NCE_KEYS(float)
MOCO_INFO_NCE_KEYS(bfloat16)
MOCO_INFO_NCE_KEYS(float16)
MOCO_INFO_NCE_KEYS(double)

}  // namespace moco_ext::cpu
