#include <vector>

#include "kernels/cpu.h"
#include "kernels/cpu/rows.h"

namespace moco_ext::cpu {

constexpr int64_t kGrain = 65536;  // elements that are worth a thread

template <typename T>
void l2_normalize(const Host& host, const T* x, T* out, accumulate_t<T>* norm, int64_t rows, int64_t cols, double eps) {
  using A = accumulate_t<T>;
  host.parallel_for(rows, 1 + kGrain / (cols + 1), [&](int64_t begin, int64_t end) {
    std::vector<A> unit(cols);
    for (int64_t i = begin; i < end; ++i) {
      const A length = load_row(x + i * cols, unit.data(), cols, true, static_cast<A>(eps));
      if (norm != nullptr) norm[i] = length;
      convert_array(unit.data(), out + i * cols, cols);
    }
  });
}

template void l2_normalize(const Host&, const float*, float*, float*, int64_t, int64_t, double);
template void l2_normalize(const Host&, const double*, double*, double*, int64_t, int64_t, double);
template void l2_normalize(const Host&, const bfloat16*, bfloat16*, float*, int64_t, int64_t, double);
template void l2_normalize(const Host&, const float16*, float16*, float*, int64_t, int64_t, double);

}  // namespace moco_ext::cpu
