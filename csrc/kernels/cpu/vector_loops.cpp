#include "kernels/cpu/vector_loops.h"

#include <cstdlib>
#include <cstring>

#include "kernels/cpu.h"

namespace moco_ext::cpu {

extern const VectorLoops vector_loops_baseline;
#ifdef MOCO_X86
extern const VectorLoops vector_loops_avx2;
extern const VectorLoops vector_loops_avx512;
#endif

namespace {

const VectorLoops& choose() {
#ifdef MOCO_X86
  // MOCO_EXT_ISA selects a lower instruction set, for tests and comparisons. One that the processor lacks is ignored.
  const char* wanted = std::getenv("MOCO_EXT_ISA");
  const auto allowed = [wanted](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return vector_loops_avx512;
  }
  if ((allowed("avx512") || allowed("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return vector_loops_avx2;
  }
#endif
  return vector_loops_baseline;
}

}  // namespace

const VectorLoops& vector_loops() {
  static const VectorLoops& chosen = choose();
  return chosen;
}

const char* instruction_set() { return vector_loops().name; }

}  // namespace moco_ext::cpu
