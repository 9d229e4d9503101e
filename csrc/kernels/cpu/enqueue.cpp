#include <algorithm>
#include <vector>

#include "kernels/cpu.h"
#include "kernels/cpu/rows.h"

namespace moco_ext::cpu {

constexpr int64_t kGrain = 65536;  // elements that are worth a thread

template <typename Key, typename Queue>
void enqueue(const Host& host, Queue* queue, int64_t* queue_ptr, const Key* keys, int64_t k, int64_t b, int64_t c,
             int64_t first, int64_t rows, bool normalize, double eps) {
  using A = accumulate_t<Key>;
  const int64_t ptr = (*queue_ptr % k + k) % k;
  const int64_t skipped = std::max<int64_t>(0, b - k);  // rows that later rows of the same batch would overwrite
  host.parallel_for(b - skipped, 1 + kGrain / c, [&](int64_t begin, int64_t end) {
    std::vector<A> row(c);
    for (int64_t i = skipped + begin; i < skipped + end; ++i) {
      const int64_t slot_row = (ptr + i) % k - first;
      if (slot_row < 0 || slot_row >= rows) continue;
      Queue* slot = queue + slot_row * c;
      if constexpr (std::is_same_v<Key, A> || std::is_same_v<Key, Queue>) {
        if (!normalize) {
          convert_array(keys + i * c, slot, c);
          continue;
        }
      }
      load_row(keys + i * c, row.data(), c, normalize, static_cast<A>(eps));
      convert_array(row.data(), slot, c);
    }
  });
  *queue_ptr = (ptr + b) % k;
}

#define MOCO_ENQUEUE(Key, Queue)                                                                                      \
  template void enqueue(const Host&, Queue*, int64_t*, const Key*, int64_t, int64_t, int64_t, int64_t, int64_t, bool, \
                        double);
#define MOCO_ENQUEUE_QUEUES(Key) MOCO_ENQUEUE(Key, float) MOCO_ENQUEUE(Key, bfloat16) MOCO_ENQUEUE(Key, float16)
MOCO_ENQUEUE_QUEUES(float)
MOCO_ENQUEUE_QUEUES(bfloat16)
MOCO_ENQUEUE_QUEUES(float16)
MOCO_ENQUEUE(double, double)

}  // namespace moco_ext::cpu
