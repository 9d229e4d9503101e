#include "kernels/cpu.h"
#include "kernels/cpu/vector_loops.h"

namespace moco_ext::cpu {
namespace {

// x [n] in the accumulation type: x itself, or converted into `piece`.
template <typename T, typename A>
inline auto widen(T* x, int64_t n, A* piece) {
  if constexpr (std::is_same_v<std::remove_const_t<T>, A>) {
    return x;
  } else {
    convert_array(x, piece, n);
    return piece;
  }
}

}  // namespace

template <typename Key, typename Query>
void momentum_update(Key* key, const Query* query, int64_t begin, int64_t end, double m) {
  using A = accumulate_t<Key>;
  const A keep = static_cast<A>(m);
  const A take = static_cast<A>(1.0 - m);
  // 16-bit elements are converted a piece at a time, in wide vectors, while the piece is in cache.
  constexpr int64_t kPiece = 1024;
  A key_piece[kPiece];
  A query_piece[kPiece];
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t n = std::min(kPiece, end - i);
    A* const k = widen(key + i, n, key_piece);
    const A* const q = widen(query + i, n, query_piece);
    for (int64_t j = 0; j < n; ++j) k[j] = keep * k[j] + take * q[j];
    if constexpr (!std::is_same_v<Key, A>) convert_array(k, key + i, n);
  }
}

template <typename To>
void copy(const float* from, To* to, int64_t n) {
  convert_array(from, to, n);
}
template void copy(const float*, float*, int64_t);
template void copy(const float*, bfloat16*, int64_t);
template void copy(const float*, float16*, int64_t);

#define MOCO_MOMENTUM(Key, Query) template void momentum_update(Key*, const Query*, int64_t, int64_t, double);
#define MOCO_MOMENTUM_QUERIES(Key) MOCO_MOMENTUM(Key, float) MOCO_MOMENTUM(Key, bfloat16) MOCO_MOMENTUM(Key, float16)
MOCO_MOMENTUM_QUERIES(float)
MOCO_MOMENTUM_QUERIES(bfloat16)
MOCO_MOMENTUM_QUERIES(float16)
MOCO_MOMENTUM(double, double)

}  // namespace moco_ext::cpu
