#include "kernels/cpu/vector_loops.h"

#include <cstdlib>
#include <cstring>

#include "kernels/cpu.h"

#if defined(MOCO_X86) && defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <cpuid.h>
#include <windows.h>
#endif

namespace moco_ext::cpu {

extern const VectorLoops vector_loops_baseline;
#ifdef MOCO_X86
extern const VectorLoops vector_loops_avx2;
extern const VectorLoops vector_loops_avx512;

#ifdef _WIN32  // where __builtin_cpu_supports needs compiler-rt, which Clang does not link
bool supports_avx2() { return IsProcessorFeaturePresent(PF_AVX2_INSTRUCTIONS_AVAILABLE); }

bool supports_avx512() {
  constexpr unsigned kNeeded = bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  unsigned a, b, c, d;
  return IsProcessorFeaturePresent(PF_AVX512F_INSTRUCTIONS_AVAILABLE) && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (b & kNeeded) == kNeeded;
}
#else
bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#endif

namespace {

const VectorLoops& choose() {
#ifdef MOCO_X86
  // MOCO_EXT_ISA selects a lower instruction set, for tests and comparisons. One that the processor lacks is ignored.
  const char* wanted = std::getenv("MOCO_EXT_ISA");
  const auto allowed = [wanted](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
  if (allowed("avx512") && supports_avx512()) return vector_loops_avx512;
  if ((allowed("avx512") || allowed("avx2")) && supports_avx2()) return vector_loops_avx2;
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
