#include "cute_layouts.h"

#include <cstddef>
#include <cstdio>
#include <cstdlib>

// CuTe's descriptors contain 32-bit shared addresses: those of `memory`.
alignas(1024) static unsigned char memory[1 << 17];
static size_t __cvta_generic_to_shared(const void* pointer) {
  return cute_layouts::kTileStart + static_cast<size_t>(static_cast<const unsigned char*>(pointer) - memory);
}
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
#include <cute/arch/util.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

namespace cute_layouts {
namespace {

using namespace cute;  // NOLINT: CuTe's names

template <int rows, typename Layout>
Element in_column_major(const Layout& layout, int thread, int i) {
  const int at = layout(thread, i);
  return {at % rows, at / rows};
}

template <typename Tensor>
uint32_t address(const Tensor& tensor, int i, int k) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(&tensor(i, k)));
}

// Calls f with the tile's CuTe tensors [rows, columns] and [columns, rows].
template <int rows, int columns, typename F>
auto with_shape(F&& f) {
  auto* const start = make_smem_ptr(reinterpret_cast<bfloat16_t*>(memory)).get();
  const auto row_layout =
      tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, Shape<Int<rows>, Int<columns>>{});
  const auto column_layout =
      tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<bfloat16_t>{}, Shape<Int<columns>, Int<rows>>{}, Step<_2, _1>{});
  return f(make_tensor(make_smem_ptr(start), row_layout), make_tensor(make_smem_ptr(start), column_layout));
}
template <typename F>
auto with_tile(const Tile& tile, F&& f) {
  if (tile.rows == 32) return tile.columns == 128 ? with_shape<32, 128>(f) : with_shape<32, 192>(f);
  if (tile.columns == 768) return with_shape<64, 768>(f);
  if (tile.columns == 64) return tile.rows == 64 ? with_shape<64, 64>(f) : with_shape<128, 64>(f);
  if (tile.columns == 128) return with_shape<128, 128>(f);
  if (tile.rows == 64) return with_shape<64, 256>(f);
  return with_shape<128, 256>(f);
}

template <int n>
struct Product;
template <>
struct Product<32> {
  using Traits = MMA_Traits<SM90_64x32x16_F32BF16BF16_RS<SM90::GMMA::Major::K, SM90::GMMA::Major::MN>>;
};
template <>
struct Product<64> {
  using Traits = MMA_Traits<SM90_64x64x16_F32BF16BF16_RS<SM90::GMMA::Major::K, SM90::GMMA::Major::MN>>;
};
template <>
struct Product<128> {
  using Traits = MMA_Traits<SM90_64x128x16_F32BF16BF16_RS<SM90::GMMA::Major::K, SM90::GMMA::Major::MN>>;
};
template <>
struct Product<192> {
  using Traits = MMA_Traits<SM90_64x192x16_F32BF16BF16_RS<SM90::GMMA::Major::K, SM90::GMMA::Major::MN>>;
};
template <>
struct Product<256> {
  using Traits = MMA_Traits<SM90_64x256x16_F32BF16BF16_RS<SM90::GMMA::Major::K, SM90::GMMA::Major::MN>>;
};
using Sm80 = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;

}  // namespace

Element sm90_accumulator(int n, int thread, int i) {
  if (n == 32) return in_column_major<64>(Product<32>::Traits::CLayout{}, thread, i);
  if (n == 192) return in_column_major<64>(Product<192>::Traits::CLayout{}, thread, i);
  if (n == 64) return in_column_major<64>(Product<64>::Traits::CLayout{}, thread, i);
  if (n == 128) return in_column_major<64>(Product<128>::Traits::CLayout{}, thread, i);
  return in_column_major<64>(Product<256>::Traits::CLayout{}, thread, i);
}
Element sm90_operand(int thread, int i) { return in_column_major<64>(Product<64>::Traits::ALayout{}, thread, i); }

Element sm80_a(int lane, int i) { return in_column_major<16>(Sm80::ALayout{}, lane, i); }
Element sm80_b(int lane, int i) {  // CuTe's B is [8, 16]
  const Element e = in_column_major<8>(Sm80::BLayout{}, lane, i);
  return {e.column, e.row};
}
Element sm80_d(int lane, int i) { return in_column_major<16>(Sm80::CLayout{}, lane, i); }

Element ldmatrix(bool transposed, int lane, int i) {
  const int bit = transposed ? Copy_Traits<SM75_U16x8_LDSM_T>::DstLayout{}(lane, 16 * i)
                             : Copy_Traits<SM75_U32x4_LDSM_N>::DstLayout{}(lane, 16 * i);
  return {bit / 128, bit % 128 / 16};
}

uint32_t address_in_rows(const Tile& tile, int row, int column) {
  return with_tile(tile, [&](const auto& by_row, const auto&) { return address(by_row, row, column); });
}
uint32_t address_in_columns(const Tile& tile, int row, int column) {
  return with_tile(tile, [&](const auto&, const auto& by_column) { return address(by_column, column, row); });
}

uint64_t row_descriptor(const Tile& tile, int part, int index, int step) {
  return with_tile(tile, [&](const auto& by_row, const auto&) -> uint64_t {
    const auto descriptor = [&](auto rows) -> uint64_t {
      return SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(
          local_tile(by_row, make_shape(rows, Int<16>{}), make_coord(index, step)));
    };
    return part == 64 ? descriptor(Int<64>{}) : descriptor(size<0>(by_row));
  });
}
uint64_t column_descriptor(const Tile& tile, int step) {
  return with_tile(tile, [&](const auto&, const auto& by_column) -> uint64_t {
    return SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(
        local_tile(by_column, make_shape(size<0>(by_column), Int<16>{}), make_coord(0, step)));
  });
}

}  // namespace cute_layouts
