// Guarded memory, used by the emulator.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace emu {

constexpr size_t kPage = 4096;
constexpr unsigned char kPoison = 0xFF;  // NaN in every format
constexpr unsigned char kGuard = 0xA5;

inline size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

// Memory followed by a page whose access faults.
unsigned char* map_pages(size_t bytes);
void unmap_pages(unsigned char* pages, size_t bytes);

// Faults in [begin, end) are reported as "access x bytes into `name` of `size` bytes", with x relative to `origin`.
void watch(unsigned char* begin, unsigned char* end, unsigned char* origin, size_t size, const char* name);
void unwatch(unsigned char* begin);
void handle_faults();

bool guard_intact(const unsigned char* begin, const unsigned char* end);
void check_allocations();
void set_error(cudaError_t error);

}  // namespace emu
