#include <vector>

#include "kernels/cpu.h"
#include "kernels/cpu/vector_loops.h"

namespace moco_ext::cpu {

void color_steps(const Host& host, const uint8_t* images, uint8_t* out, int64_t n, int64_t height, int64_t width,
                 const int64_t* steps, int64_t count, const float* factors, const float* kernels, int64_t taps) {
  const int64_t numel = 3 * height * width;
  host.parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(numel + (height + taps) * width + width + taps);
    for (int64_t i = begin; i < end; ++i) {
      vector_loops().colors({images + i * numel, out + i * numel, height, width, steps + i * count, count,
                             factors + 4 * i, kernels + i * taps, taps, scratch.data()});
    }
  });
}

}  // namespace moco_ext::cpu
