// Layouts as CuTe (CUTLASS) defines them, for test_cute.cpp. In a translation unit of its own, because CuTe's headers
// and the emulator's do not go together.
#pragma once

#include <cstdint>

namespace cute_layouts {

struct Element {
  int row, column;
};

// A warpgroup's product: D [64, n], n 32, 64, 128, 192 or 256, and A [64, 16] in registers; value i of a thread.
Element sm90_accumulator(int n, int thread, int i);
Element sm90_operand(int thread, int i);

// A warp's product: A [16, 16], B [16, 8], D [16, 8].
Element sm80_a(int lane, int i);
Element sm80_b(int lane, int i);
Element sm80_d(int lane, int i);

// ldmatrix.x4 of 16-bit elements: the lane gets, as its i-th of 8, element `column` of the row that lane `row` points
// to.
Element ldmatrix(bool transposed, int lane, int i);

// A tile [rows, columns] of 16-bit elements in shared memory with 128-byte swizzle, at kTileStart.
constexpr uint32_t kTileStart = 5 * 1024;
struct Tile {
  int rows, columns;
};
constexpr Tile kTiles[] = {{128, 64}, {128, 128}, {64, 256}, {128, 256}, {32, 128}, {32, 192}, {64, 64}, {64, 768}};
// Address of an element, with the tile as an operand whose rows, or whose columns, are contracted.
uint32_t address_in_rows(const Tile& tile, int row, int column);
uint32_t address_in_columns(const Tile& tile, int row, int column);
// Descriptors of `part` rows, the index-th, and 16 columns, the step-th; and of all columns and 16 rows.
uint64_t row_descriptor(const Tile& tile, int part, int index, int step);
uint64_t column_descriptor(const Tile& tile, int step);

}  // namespace cute_layouts
