// The layouts that the kernels and the emulator's models assume, against CuTe's own: fragments of matrix products,
// ldmatrix, tiles with 128-byte swizzle, and operand descriptors.
#include <cmath>
#include <vector>

#include "check.h"
#include "cute_layouts.h"
#include "emulated_sm90.h"
#include "kernels/cuda/info_nce_softmax.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/sm90.cuh"

namespace {

namespace cuda = moco_ext::cuda;
namespace sm90 = moco_ext::cuda::sm90;
using cute_layouts::kTileStart;
using cute_layouts::Tile;

bool same(const auto& a, const auto& b) { return a.row == b.row && a.column == b.column; }

void test_warpgroup_fragments() {
  bool accumulators = true, operands = true, softmax = true, repacked = true;
  for (int t = 0; t < 128; ++t) {
    for (const int n : {32, 64, 128, 192, 256}) {
      for (int i = 0; i < n / 2; ++i)
        accumulators &= same(cute_layouts::sm90_accumulator(n, t, i), emu::accumulator_element(t, i));
    }
    for (int i = 0; i < 8; ++i) operands &= same(cute_layouts::sm90_operand(t, i), emu::operand_element(t, i));
    for (int i = 0; i < 64; ++i) {  // s[i / 4][i % 4] in info_nce_softmax.cuh
      const auto [row, column] = cute_layouts::sm90_accumulator(128, t, i);
      softmax &= row == t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8;
      for (const int valid : {column, column + 1}) {
        float s[16][4] = {};
        cuda::drop_scores(s, valid, t % 32);
        softmax &= (s[i / 4][i % 4] == -INFINITY) == (valid == column);
      }
      // Scores of 16 adjacent keys are an operand as they are: register r holds tile r / 2, elements r % 2 * 2 and 1
      // on.
      const auto [operand_row, k] = cute_layouts::sm90_operand(t, i % 8);
      repacked &= operand_row == row && i / 8 * 16 + k == column;
    }
  }
  check::that(accumulators, "accumulators of the emulator's warpgroup product");
  check::that(operands, "operand registers of the emulator's warpgroup product");
  check::that(softmax, "rows and keys of info_nce_softmax.cuh");
  check::that(repacked, "packed scores as an operand");
}

__global__ void copy_tile(const CUtensorMap map, uint16_t* out, int panels, int panel_bytes) {
  MOCO_DYNAMIC_SHARED(raw);
  const uint32_t tile = (sm90::shared_address(raw) + 1023u) & ~1023u;
  const uint32_t barrier = tile + panels * panel_bytes;
  sm90::barrier_init(barrier, 1);
  sm90::barrier_init_done();
  sm90::barrier_expect(barrier, panels * panel_bytes);
  for (int p = 0; p < panels; ++p) sm90::copy_tensor(tile + p * panel_bytes, map, 64 * p, 0, barrier);
  sm90::barrier_wait(barrier, 0);
  std::memcpy(out, raw + (tile - sm90::shared_address(raw)), static_cast<size_t>(panels * panel_bytes));
}

void test_tile(const Tile& tile) {
  const auto [rows, columns] = tile;
  const int panel_bytes = rows * 128;
  const std::string name = std::to_string(rows) + " x " + std::to_string(columns);

  std::vector<uint16_t> x(rows * columns), shared(rows * columns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i);
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check::cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1};
  reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, x.data(), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check::cuda(
      cuda::launch(copy_tile, 1, 1, 1024 + x.size() * 2 + 8, nullptr, map, shared.data(), columns / 64, panel_bytes));

  bool kernel = true, copied = true, both_ways = true;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      const uint32_t address = cute_layouts::address_in_rows(tile, r, c);
      both_ways &= cute_layouts::address_in_columns(tile, r, c) == address;
      kernel &= kTileStart + sm90::element_offset(r, c, panel_bytes) == address;
      copied &= shared[(address - kTileStart) / 2] == r * columns + c;
    }
  }
  check::that(kernel, name + ": element_offset");
  check::that(copied, name + ": the emulator's tensor copies");
  check::that(both_ways, name + ": the same tile is the operand of both products");

  bool descriptors = true, read = true;
  for (const int part : {64, rows}) {
    for (int index = 0; index < rows / part; ++index) {
      const uint64_t operand = sm90::row_operand(kTileStart + index * part * 128);
      for (int step = 0; step < columns / 16; ++step) {
        const uint64_t expected = cute_layouts::row_descriptor(tile, part, index, step);
        descriptors &= sm90::advance(operand, step / 4 * panel_bytes + step % 4 * 32) == expected;
        const emu::OperandDescriptor d(expected);
        for (int i = 0; i < part; ++i) {
          for (int k = 0; k < 16; ++k)
            read &=
                emu::k_major_address(d, i, k) == cute_layouts::address_in_rows(tile, index * part + i, step * 16 + k);
        }
      }
    }
  }
  // With a single panel, the distance between panels has no meaning.
  const uint64_t meaningful = columns == 64 ? ~(uint64_t{0x3fff} << 16) : ~uint64_t{0};
  for (int step = 0; step < rows / 16; ++step) {
    const uint64_t expected = cute_layouts::column_descriptor(tile, step);
    const uint64_t operand = sm90::advance(sm90::column_operand(kTileStart, panel_bytes), step * 2048);
    descriptors &= ((operand ^ expected) & meaningful) == 0;
    const emu::OperandDescriptor d(expected);
    for (int i = 0; i < columns; ++i) {
      for (int k = 0; k < 16; ++k)
        read &= emu::mn_major_address(d, i, k) == cute_layouts::address_in_columns(tile, step * 16 + k, i);
    }
  }
  check::that(descriptors, name + ": descriptors");
  check::that(read, name + ": the emulator's reading of descriptors");
}

__global__ void warp_product(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  const __nv_bfloat16 type{};
  uint32_t a_words[4], b_words[2];
  for (int i = 0; i < 4; ++i) {
    const auto [row, column] = cute_layouts::sm80_a(lane, 2 * i);
    const auto [row1, column1] = cute_layouts::sm80_a(lane, 2 * i + 1);
    a_words[i] = cuda::pack(a[row * 16 + column], a[row1 * 16 + column1], type);
  }
  for (int i = 0; i < 2; ++i) {
    const auto [row, column] = cute_layouts::sm80_b(lane, 2 * i);
    const auto [row1, column1] = cute_layouts::sm80_b(lane, 2 * i + 1);
    b_words[i] = cuda::pack(b[row * 8 + column], b[row1 * 8 + column1], type);
  }
  float sums[4] = {};
  cuda::mma(type, sums, a_words, b_words[0], b_words[1]);
  for (int i = 0; i < 4; ++i) {
    const auto [row, column] = cute_layouts::sm80_d(lane, i);
    d[row * 8 + column] = sums[i];
  }
}

__global__ void load_matrices(int transposed, int* bad) {
  MOCO_DYNAMIC_SHARED(raw);
  auto* const rows = reinterpret_cast<uint16_t*>(raw);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) rows[lane * 8 + i] = static_cast<uint16_t>(lane * 8 + i);
  __syncwarp();
  uint32_t words[4];
  if (transposed) {
    cuda::ldmatrix_x4_trans(words, cuda::shared_address(&rows[lane * 8]));
  } else {
    cuda::ldmatrix_x4(words, cuda::shared_address(&rows[lane * 8]));
  }
  for (int i = 0; i < 8; ++i) {
    const auto [row, column] = cute_layouts::ldmatrix(transposed, lane, i);
    *bad += static_cast<int>(words[i / 2] >> i % 2 * 16 & 0xffff) != row * 8 + column;
  }
}

void test_warp_fragments() {
  float a[16 * 16], b[16 * 8], d[16 * 8];
  for (int i = 0; i < 16 * 16; ++i) a[i] = static_cast<float>(i * 37 % 101);
  for (int i = 0; i < 16 * 8; ++i) b[i] = static_cast<float>(i * 53 % 97);
  check::cuda(cuda::launch(warp_product, 1, 32, 0, nullptr, a, b, d));
  bool product = true;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * 8 + column];
      product &= d[row * 8 + column] == sum;
    }
  }
  check::that(product, "fragments of the emulator's warp product");
  for (const int transposed : {0, 1}) {
    int bad = 0;
    check::cuda(cuda::launch(load_matrices, 1, 32, 32 * 16, nullptr, transposed, &bad));
    check::that(bad == 0, transposed ? "the emulator's ldmatrix.trans" : "the emulator's ldmatrix");
  }
}

}  // namespace

int main() {
  test_warpgroup_fragments();
  for (const Tile& tile : cute_layouts::kTiles) test_tile(tile);
  test_warp_fragments();
  return check::finish();
}
