// Models of Hopper's asynchronous instructions, written from the PTX ISA: mbarriers, bulk tensor copies, warpgroup
// products. Included by kernels/cuda/sm90.cuh. Part of emulator.h's contract: what a kernel does wrong aborts with a
// message or gives wrong results.
//   - A copy poisons its destination (NaN) when it is issued, and fills it at a moment of the scheduler's choice.
//   - A warp's rows of a product read shared memory at a moment of the scheduler's choice after the warp, not all of
//   its
//     warpgroup, has issued it. Accumulators change only when the thread waits for it. In between they are NaN. Writing
//     them or its operand registers in between aborts.
//   - Copies and products access shared memory through the asynchronous proxy: they see what a thread wrote with
//     store_shared only after that thread's next fence_proxy_async. (Plain writes are published by any thread's fence.)
//   - A block that exits with copies or products in flight aborts.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "emulator.h"

namespace emu {

// Shared memory has 32-bit addresses, congruent to generic addresses modulo a page.
uint32_t shared_window(const void* generic);

void mbarrier_init(uint32_t barrier, int arrivals, Where where);
void mbarrier_fence_init();
void mbarrier_arrive(uint32_t barrier, int expected_bytes, Where where);
void mbarrier_wait(uint32_t barrier, int parity, Where where);
void fence_proxy_async();
void load_shared(uint32_t shared, void* to, uint32_t bytes, Where where = Where::current());
void store_shared(uint32_t shared, const void* from, uint32_t bytes, Where where);  // a multiple of 4 bytes

void copy_tensor(uint32_t shared, const CUtensorMap& map, int column, int row, uint32_t barrier, Where where);

void set_max_registers(int count, Where where);  // setmaxnreg

// ---- wgmma

enum class Format { kBFloat16, kFloat16 };

// Bits of an operand descriptor.
struct OperandDescriptor {
  uint32_t start, leading, stride, base_offset, swizzle;
  explicit constexpr OperandDescriptor(uint64_t d)
      : start(static_cast<uint32_t>(d & 0x3fff) << 4),
        leading(static_cast<uint32_t>(d >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(d >> 32 & 0x3fff) << 4),
        base_offset(static_cast<uint32_t>(d >> 49 & 7)),
        swizzle(static_cast<uint32_t>(d >> 62)) {}
};
constexpr uint32_t kSwizzle128Bytes = 1;

// 128-byte swizzle of an address: bits 4 to 6 are XORed with bits 7 to 9.
constexpr uint32_t swizzle_128(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Addresses of 16-bit elements with 128-byte swizzle: index i of the 64 or n outputs, k of the 16 that are contracted.
// "k-major": k is contiguous; groups of 8 i are `stride` apart.
constexpr uint32_t k_major_address(const OperandDescriptor& d, int i, int k) {
  return swizzle_128(d.start + static_cast<uint32_t>(i / 8) * d.stride + static_cast<uint32_t>(i % 8 * 128 + k * 2));
}
// "mn-major": 64 i are contiguous; groups of 64 i are `leading` apart, groups of 8 k are `stride` apart.
constexpr uint32_t mn_major_address(const OperandDescriptor& d, int i, int k) {
  return swizzle_128(d.start + static_cast<uint32_t>(i / 64) * d.leading + static_cast<uint32_t>(k / 8) * d.stride +
                     static_cast<uint32_t>(i % 64 * 2 + k % 8 * 128));
}

struct Element {
  int row, column;
};
// Of D [64, n]: register i of a thread of the warpgroup.
constexpr Element accumulator_element(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}
// Of A [64, 16] in registers: the i-th of a thread's 8 elements, two in each register.
constexpr Element operand_element(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, thread % 4 * 2 + i % 2 + i / 4 * 8};
}

// d [64, n] = (keep ? d : 0) + a b, issued by every thread of a warpgroup with its registers of d and, if a_registers
// is not null, of a; else a is a_descriptor's operand.
struct Product {
  float* d;
  int n;
  bool keep;
  const uint32_t* a_registers;
  uint64_t a_descriptor, b_descriptor;
  bool b_mn_major;
  Format format;
};
void issue_product(const Product& product, Where where);
void products_fence();
void products_commit(Where where);
void products_wait(int groups_left, Where where);

}  // namespace emu
