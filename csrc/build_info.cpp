// What this build is, one fact a line, most of them from CMakeLists.txt. moco_ext/library.py reads it with ctypes: an
// extension module would tie the wheel to one version of Python.
#include <torch/headeronly/macros/Export.h>

#include <string>

#include "kernels/cpu.h"

extern "C" C10_EXPORT const char* moco_ext_build_info() {
  static const std::string info =
      MOCO_EXT_BUILD_INFO "\ninstruction_set=" + std::string(moco_ext::cpu::instruction_set());
  return info.c_str();
}
