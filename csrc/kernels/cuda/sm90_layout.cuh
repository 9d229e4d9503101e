// Addresses and phases of the Hopper pass. csrc/tests/test_sm90_model.cpp tests this arithmetic against models of the
// tensor copy, the warpgroup product and the mbarrier.
//
// A tile in shared memory consists of panels of 64 16-bit columns, [rows, 128 bytes] each, as written by a tensor copy
// with 128-byte swizzle: the 16-byte chunks of row r are permuted by chunk ^ (r % 8). Panels start on multiples of
// 1,024 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moco_ext::cuda::sm90 {

// Offset of 16-byte chunk `chunk` of a row of the tile.
__host__ __device__ constexpr uint32_t chunk_offset(int row, int chunk, int panel_bytes) {
  return static_cast<uint32_t>(chunk / 8 * panel_bytes + row * 128 + (chunk % 8 ^ row % 8) * 16);
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

// ---- the ring: tile t is in stage t % stages

// Parity to wait for on a stage's `full` barrier before reading tile t.
__host__ __device__ constexpr int full_parity(int tile, int stages) { return tile / stages & 1; }
// Parity to wait for on its `empty` barrier before fetching tile t: in the first round every stage is empty.
__host__ __device__ constexpr int empty_parity(int tile, int stages) { return (tile / stages & 1) ^ 1; }

}  // namespace moco_ext::cuda::sm90
