// Guarded memory, and the runtime functions that launchers and tests call (libcudart is not linked).
#include "emulated_memory.h"

#include <signal.h>
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "emulator.h"

namespace emu {
namespace {

struct Region {
  unsigned char* end;
  unsigned char* origin;
  size_t size;
  const char* name;
};

struct Allocation {
  unsigned char* pages;
  size_t mapped, size;
};

// Functions rather than globals: a test's own globals may allocate first.
std::map<unsigned char*, Region>& regions() {
  static std::map<unsigned char*, Region> regions;
  return regions;
}

std::map<unsigned char*, Allocation>& allocations() {
  static std::map<unsigned char*, Allocation> allocations;
  return allocations;
}

cudaError_t last_error = cudaSuccess;

void on_fault(int, siginfo_t* info, void*) {
  auto* const address = static_cast<unsigned char*>(info->si_addr);
  auto found = regions().upper_bound(address);
  if (found != regions().begin()) {
    const auto& [begin, region] = *--found;
    if (address < region.end)
      fail("access %td bytes into %s of %zu bytes", address - region.origin, region.name, region.size);
  }
  fail("access to the invalid address %p", static_cast<void*>(address));
}

void check_allocation(unsigned char* start, const Allocation& allocation) {
  if (!guard_intact(allocation.pages, start) ||
      !guard_intact(start + allocation.size, allocation.pages + allocation.mapped)) {
    fail("a write just outside an allocation of %zu bytes", allocation.size);
  }
}

}  // namespace

unsigned char* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) fail("out of memory");
  auto* const first = static_cast<unsigned char*>(pages);
  mprotect(first + bytes, kPage, PROT_NONE);
  return first;
}

void unmap_pages(unsigned char* pages, size_t bytes) { munmap(pages, bytes + kPage); }

void watch(unsigned char* begin, unsigned char* end, unsigned char* origin, size_t size, const char* name) {
  regions()[begin] = {end, origin, size, name};
}

void unwatch(unsigned char* begin) { regions().erase(begin); }

void handle_faults() {
  static const bool done = [] {
    static unsigned char stack[64 * 1024];  // separate, because the fiber's stack may have overflowed
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, nullptr);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    return true;
  }();
  static_cast<void>(done);
}

bool guard_intact(const unsigned char* begin, const unsigned char* end) {
  for (; begin < end; ++begin) {
    if (*begin != kGuard) return false;
  }
  return true;
}

void check_allocations() {
  for (const auto& [start, allocation] : allocations()) check_allocation(start, allocation);
}

void set_error(cudaError_t error) { last_error = error; }

}  // namespace emu

using namespace emu;

cudaError_t cudaMalloc(void** pointer, size_t size) {
  handle_faults();
  if (size == 0) {
    *pointer = nullptr;
    return cudaSuccess;
  }
  // At least 16-byte alignment, and 256 if the size is a multiple of it, so that the end is next to the unmapped page.
  Allocation allocation{nullptr, round_up(size, kPage), size};
  allocation.pages = map_pages(allocation.mapped);
  unsigned char* const start = allocation.pages + allocation.mapped - round_up(size, 16);
  memset(allocation.pages, kGuard, allocation.mapped);
  memset(start, kPoison, size);
  allocations()[start] = allocation;
  watch(allocation.pages, allocation.pages + allocation.mapped + kPage, start, size, "an allocation");
  *pointer = start;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  const auto found = allocations().find(static_cast<unsigned char*>(pointer));
  if (found == allocations().end()) fail("cudaFree of %p, which is no allocation", pointer);
  check_allocation(found->first, found->second);
  unwatch(found->second.pages);
  unmap_pages(found->second.pages, found->second.mapped);
  allocations().erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes != 0) memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (bytes != 0) memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "emulated CUDA error"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = config().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(config().max_dynamic_shared);
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    default:
      fail("cudaDeviceGetAttribute(%d) is not emulated", static_cast<int>(attribute));
  }
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = config().blocks_per_multiprocessor;
  return cudaSuccess;
}
