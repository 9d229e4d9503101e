#include "kernels/cpu.h"

namespace moco_ext::cpu {

template <typename Key, typename Query>
void momentum_update(Key* key, const Query* query, int64_t begin, int64_t end, double m) {
  using A = accumulate_t<Key>;
  const A keep = static_cast<A>(m);
  const A take = static_cast<A>(1.0 - m);
  Key* __restrict k = key + begin;
  const Query* __restrict q = query + begin;
  for (int64_t i = 0; i < end - begin; ++i) k[i] = convert<Key>(keep * convert<A>(k[i]) + take * convert<A>(q[i]));
}

#define MOCO_MOMENTUM(Key, Query) template void momentum_update(Key*, const Query*, int64_t, int64_t, double);
#define MOCO_MOMENTUM_QUERIES(Key) MOCO_MOMENTUM(Key, float) MOCO_MOMENTUM(Key, bfloat16) MOCO_MOMENTUM(Key, float16)
MOCO_MOMENTUM_QUERIES(float)
MOCO_MOMENTUM_QUERIES(bfloat16)
MOCO_MOMENTUM_QUERIES(float16)
MOCO_MOMENTUM(double, double)

}  // namespace moco_ext::cpu
