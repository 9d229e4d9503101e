// A tile of keys in shared memory and the two products that read it, S = Q K^T and O += P K.
//
// A float32 operand is a sum of 16-bit terms. The block splits each key tile once, in place. Then a product of floats
// is a few products of terms.
#pragma once

#include <type_traits>

#include "kernels/cuda/info_nce_terms.cuh"
#include "kernels/cuda/mma.cuh"

namespace moco_ext::cuda {

// terms is 1 for 16-bit queues. In shared memory: kStages stages of the ring, third terms, partial scores to exchange,
// queries.
// A stage is a tile of 16-bit elements for each 16-bit half of an element.
template <typename Element_, typename Operand_, int terms, int columns>
struct MmaTile {
  using Element = Element_;
  using Operand = Operand_;
  static constexpr int kTerms = terms;
  static constexpr bool kScaled = std::is_same_v<Element, float> && std::is_same_v<Operand, __half>;
  static constexpr bool kExact = terms == (kScaled ? 2 : 3);
  static constexpr float kScale = kScaled ? kUnitRowScale : 1.0f;  // of queries and keys
  static constexpr int kSourceBytes = columns * sizeof(Element);   // of a key in the queue
  // Each warp reads every key, so 32 rows per warp halve these reads. Their queries do not fit in registers, and more
  // terms or columns do not fit in shared memory.
  static constexpr int kRowTiles = terms == 1 && kSourceBytes <= 512 ? 2 : 1;  // of 16 rows
  static constexpr int kWarpColumns = columns == 64 || (terms == 3 && columns == 512) ? 64 : 128;
  // Of a query; a further term is in shared memory, each thread's fragments for itself.
  static constexpr int kRegisterTerms = kRowTiles == 2 ? 0 : terms == 3 && kWarpColumns == 128 ? terms - 1 : terms;
  static constexpr int kColumnGroups = columns / kWarpColumns;
  static constexpr int kRowWarps = kColumnGroups < (kRowTiles == 1 ? 4 : 2)     ? 4
                                   : kColumnGroups <= 4 || kSourceBytes <= 1536 ? 2
                                                                                : 1;
  static constexpr int kSteps = kWarpColumns / 16;  // of the contraction in S
  static constexpr int kWarps = kRowWarps * kColumnGroups;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarpRows * kRowWarps;
  static constexpr int kSourceChunks = kSourceBytes / 16;
  static constexpr int kRowBytes = columns * 2;  // of a key in a 16-bit tile
  static constexpr int kKeys = columns == 64 && !kExact ? 64 : kSourceBytes <= (kExact ? 256 : 1024) ? 32 : 16;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = kKeys * kSourceBytes;
  // The exchange of scores, after which no warp reads third terms, allows overwriting them for the next tile.
  static constexpr int kThirds = terms < 3 ? 0 : kColumnGroups > 1 ? 1 : 2;
  static constexpr int kExchangeBytes = kColumnGroups > 1 ? kWarps * kWarpRows * kKeys * 4 : 0;
  static constexpr int kQueryBytes = (terms - kRegisterTerms) * kThreads * kRowTiles * kSteps * 16;
  static constexpr int kOtherBytes = kThirds * kTileBytes + kExchangeBytes + kQueryBytes;
  // What fits in the 99 KB that a block may use on sm_86, sm_89 and sm_120 (float rows of 768 and 1024 use the generic
  // pass there) or else in sm_80's 163 KB.
  static constexpr int kStages = 3 * kStageBytes + kOtherBytes <= 48 * 1024    ? 3
                                 : 2 * kStageBytes + kOtherBytes <= 163 * 1024 ? 2
                                                                               : 1;
  static constexpr int kSharedBytes = kStages * kStageBytes + kOtherBytes;
  static_assert(columns % kWarpColumns == 0 && kThreads % kSourceChunks == 0);
  static_assert(kSharedBytes <= (kSourceBytes <= 2048 ? 99 : 163) * 1024);
};

// A pair of elements as words of `terms` operands, whose sum it is but for the rounding of the last.
template <typename Operand, int terms>
__device__ __forceinline__ void split(float x, float y, uint32_t (&words)[terms]) {
#pragma unroll
  for (int t = 0; t < terms; ++t) words[t] = take_term(x, y, Operand{});
}

// The products of terms that make up a product of floats: [0] is a's term, [1] b's. Smallest first, because tensor
// cores round sums towards zero. From kFirstOf3: of three terms; from kFirstOf2: of two; the last: of one.
constexpr int kFirstOf3 = 0, kFirstOf2 = 3, kFirstOf1 = 5, kProducts = 6;
__device__ constexpr int product_term(int product, int operand) {
  constexpr int kTerm[kProducts][2] = {{2, 0}, {0, 2}, {1, 1}, {1, 0}, {0, 1}, {0, 0}};
  return kTerm[product][operand];
}

// Byte of a 16-byte chunk in the row of `key` in a term's tile. The same chunk of the eight rows that one ldmatrix
// phase reads is in distinct banks, and so are eight adjacent chunks of floats, which alternate between terms 0 and 1.
__device__ __forceinline__ constexpr int chunk_offset(int chunk, int key, int term) {
  return (chunk & ~7) * 16 + ((chunk ^ key ^ term << 2) & 7) * 16;
}

// s [kWarpRows, kKeys] = this warp's columns of Q K^T. keys: the tiles of the terms of K.
//
// The rounding of tensor cores is a bias that grows with the number of terms. So exact products accumulate there only
// over 128 columns, small ones apart (here), or over one tile (of P K), and ordinary additions add up the results.
template <typename Tile, typename Query>
__device__ __forceinline__ void multiply_scores(float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4], const Query& query,
                                                const SharedAddress (&keys)[Tile::kTerms], int lane) {
  constexpr bool kExact = Tile::kExact;
  constexpr int kFirst = Tile::kTerms == 3 ? kFirstOf3 : Tile::kTerms == 2 ? kFirstOf2 : kFirstOf1;
  // Matrices of one ldmatrix: keys 0-7 chunk 0, keys 0-7 chunk 1, keys 8-15 chunk 0, keys 8-15 chunk 1.
  const int key = lane % 8 + lane / 16 * 8;
  const int chunk = lane / 8 % 2;
  float small[Tile::kRowTiles][Tile::kKeys / 8][4] = {};
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 2; ++i) s[m][i / 4][i % 4] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    uint32_t b[Tile::kTerms][Tile::kKeys / 16][4];
#pragma unroll
    for (int t = 0; t < Tile::kTerms; ++t) {
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 16; ++j) {
        ldmatrix_x4(b[t][j], keys[t] + (16 * j + key) * Tile::kRowBytes + chunk_offset(2 * step + chunk, key, t));
      }
    }
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
      for (int product = kFirst; product < kProducts; ++product) {
        uint32_t a[4];
        query(a, product_term(product, 0), m, step);
#pragma unroll
        for (int j = 0; j < Tile::kKeys / 8; ++j) {
          const auto& raw = b[product_term(product, 1)][j / 2];
          auto& to = kExact && product < kProducts - 1 ? small[m][j] : s[m][j];
          mma(typename Tile::Operand{}, to, a, raw[j % 2 * 2], raw[j % 2 * 2 + 1]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; kExact && i < Tile::kKeys / 2; ++i) s[0][i / 4][i % 4] += small[0][i / 4][i % 4];
}

// o [kWarpRows, kWarpColumns] += factor P K, with a factor of 1 unless kExact. The packed accumulators of two adjacent
// 8-key tiles of S already are an A operand, and ldmatrix.trans makes the B operand from the rows that S read. kTerms:
// of P and K.
template <typename Tile, int kTerms>
__device__ __forceinline__ void multiply_keys(float (&o)[Tile::kRowTiles][Tile::kWarpColumns / 8][4],
                                              const float (&p)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                              const SharedAddress (&keys)[Tile::kTerms], float factor, int lane) {
  constexpr bool kExact = Tile::kExact;
  uint32_t a[kTerms][Tile::kRowTiles][Tile::kKeys / 16][4];
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 4; ++i) {
      uint32_t words[kTerms];
      split<typename Tile::Operand>(p[m][i / 2][i % 2 * 2], p[m][i / 2][i % 2 * 2 + 1], words);
#pragma unroll
      for (int t = 0; t < kTerms; ++t) a[t][m][i / 4][i % 4] = words[t];
    }
  }
  // Matrices of one ldmatrix: keys 0-7 chunk 0, keys 8-15 chunk 0, keys 0-7 chunk 1, keys 8-15 chunk 1.
  const int key = lane % 16;
  const int chunk = lane / 16;
#pragma unroll
  for (int i = 0; i < Tile::kWarpColumns / 16; ++i) {
    uint32_t b[kTerms][Tile::kKeys / 16][4];
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 16; ++j) {
        ldmatrix_x4_trans(b[t][j], keys[t] + (16 * j + key) * Tile::kRowBytes + chunk_offset(2 * i + chunk, key, t));
      }
    }
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum[4] = {};
        float (&to)[4] = kExact ? sum : o[m][2 * i + h];
#pragma unroll
        for (int product = kTerms == 2 ? kFirstOf2 : kFirstOf1; product < kProducts; ++product) {
#pragma unroll
          for (int j = 0; j < Tile::kKeys / 16; ++j) {
            const auto& raw = b[product_term(product, 1)][j];
            mma(typename Tile::Operand{}, to, a[product_term(product, 0)][m][j], raw[2 * h], raw[2 * h + 1]);
          }
        }
        if constexpr (kExact) {
#pragma unroll
          for (int r = 0; r < 4; ++r) o[m][2 * i + h][r] = fmaf(sum[r], factor, o[m][2 * i + h][r]);
        }
      }
    }
  }
}

}  // namespace moco_ext::cuda
