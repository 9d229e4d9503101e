// Addresses and phases of the Hopper pass. csrc/tests/test_cute.cpp compares the addresses with CuTe's.
//
// A tile in shared memory consists of panels of 64 16-bit columns, [rows, 128 bytes] each, as written by a tensor copy
// with 128-byte swizzle: the 16-byte chunks of row r are permuted by chunk ^ (r % 8). Panels start on multiples of
// 1,024 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moco_ext::cuda::sm90 {

// Offset of an element of the tile.
__host__ __device__ constexpr uint32_t element_offset(int row, int column, int panel_bytes) {
  return static_cast<uint32_t>(column / 64 * panel_bytes + row * 128 + (column / 8 % 8 ^ row % 8) * 16 +
                               column % 8 * 2);
}

// ---- operand descriptors of warpgroup products

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint64_t kGroupOfRows = uint64_t{1024 / 16} << 32;  // bytes between groups of 8 rows

// Operand contracted along the bytes of its rows (64 columns of a panel): Q, and K in Q K^T.
__host__ __device__ constexpr uint64_t row_operand(uint32_t shared) {
  return kSwizzle128 | kGroupOfRows | uint64_t{1} << 16 | (shared & 0x3ffffu) >> 4;
}
// Operand contracted down its rows: K in P K. Panels are `panel_bytes` apart.
__host__ __device__ constexpr uint64_t column_operand(uint32_t shared, int panel_bytes) {
  return kSwizzle128 | kGroupOfRows | static_cast<uint64_t>(panel_bytes >> 4) << 16 | (shared & 0x3ffffu) >> 4;
}
// The same operand, `bytes` further: the low word's sum stays within the address, as shared memory ends below 256 KB.
__host__ __device__ constexpr uint64_t advance(uint64_t operand, int bytes) {
  return (operand & ~uint64_t{0xffffffffu}) | (static_cast<uint32_t>(operand) + static_cast<uint32_t>(bytes >> 4));
}

// ---- the ring: slot t is in stage t % stages

// Parity to wait for on a stage's `full` barrier before reading slot t.
__host__ __device__ constexpr int full_parity(int slot, int stages) { return slot / stages & 1; }
// Parity to wait for on its `empty` barrier before filling slot t: in the first round every stage is empty.
__host__ __device__ constexpr int empty_parity(int slot, int stages) { return (slot / stages & 1) ^ 1; }

}  // namespace moco_ext::cuda::sm90
