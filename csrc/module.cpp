// `moco_ext._C`: what this build is. The operators themselves need no Python; see ops.cpp.
#include <pybind11/pybind11.h>

#include "kernels/cpu.h"

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = MOCO_EXT_VERSION;
    info["compiler"] = MOCO_EXT_COMPILER;
    info["cuda_compiler"] = MOCO_EXT_CUDA_COMPILER;  // "" where CUDA was not built
    info["cuda_archs"] = MOCO_EXT_CUDA_ARCHS;        // CMake's notation, spaces between them
    info["torch_target"] = MOCO_EXT_TORCH_TARGET;    // the oldest torch whose stable ABI suffices
    info["torch_headers"] = MOCO_EXT_TORCH_HEADERS;  // the torch whose headers were compiled against
    info["instruction_set"] = moco_ext::cpu::instruction_set();
    return info;
  });
}
