// The InfoNCE pass over the queue on tensor cores (sm_80 and newer): attention whose values are its keys.
//
// A block handles kRows queries and one split of the queue, and loads key tiles through a cp.async ring. The same tile
// is the operand of both products, S = Q K^T and O += P K. A warp handles 16 rows and up to 128 columns. Longer rows
// are divided among kColumnGroups warps, which add up their parts of S through shared memory, so that query fragments
// and O stay in registers for every C. A block writes its partial results once, at its end.
//
// A key row takes kRowBytes of shared memory, with its 16-byte chunks permuted by chunk ^ (key & 7): the same chunk of
// the eight rows that one ldmatrix phase reads is then in distinct banks, without padding.
#pragma once

#include <type_traits>

#include "kernels/cuda/info_nce_softmax.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {

template <typename Element, bool kExact, int columns>
struct MmaTile {
  // kExact needs registers for both halves of every operand.
  static constexpr int kWarpColumns = columns == 64 || (kExact && columns < 512) ? 64 : 128;
  static constexpr int kColumnGroups = columns / kWarpColumns;
  // Limited by the registers besides O and the query: 255 per thread with 8 warps, 168 with 12.
  static constexpr int kRowWarps = kColumnGroups < 4 ? 4 : columns <= 512 || columns * sizeof(Element) <= 1536 ? 2 : 1;
  static constexpr int kWarps = kRowWarps * kColumnGroups;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kRowBytes = columns * sizeof(Element);
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kKeys = kRowBytes <= 256 && !kExact ? 64 : kRowBytes <= 1024 ? 32 : 16;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  // Fits in the 99 KB that a block may use on sm_86, sm_89 and sm_120, except float rows of 768 and 1024, which use the
  // generic pass there.
  static constexpr int kStages = kTileBytes <= 16 * 1024 ? 3 : 2;
  static constexpr int kExchangeBytes = kColumnGroups > 1 ? kThreads * kKeys / 2 * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kSharedBytes = kStages * kTileBytes + kExchangeBytes;
  static constexpr int kWarpBytes = kWarpColumns * sizeof(Element);
  static constexpr int kSteps = kWarpBytes / 32;  // steps of the contraction in S, 32 bytes of a row each
  static_assert(columns % kWarpColumns == 0 && kThreads % kRowChunks == 0);
  static_assert(kSharedBytes <= (kRowBytes <= 2048 ? 99 : 163) * 1024);
};

// A query in the pass over its keys. upstream * (p - target) is upstream * exp2(score * scale - lse) - floor, minus
// share for a further positive, which info_nce_keys_combine_kernel subtracts; there it also adds the query's own key.
struct alignas(16) InfoNceColumn {
  float lse;  // in units of log 2
  float upstream;
  float floor;  // this and share are multiplied by upstream
  float share;
};

template <typename Element>
struct MmaArguments {
  const uint32_t* query;   // [N_padded, C] of Element, normalized and scaled by 1 / row_scale
  const Element* queue;    // [K, C], 16-byte aligned
  const float* positive;   // [N_padded] score of the query and its positive
  const float* row_scale;  // [N_padded] a power of two
  InfoNcePartials partials;
  int64_t n;
  InfoNceKeyCount count;
  InfoNceMask mask;
  InfoNceTemperature temperature;
  const InfoNceColumn* columns;  // [K] for kKeys
};

// What a pass computes for its rows: the loss; the loss and the gradient; or the gradient of keys, with keys as rows
// and queries whose losses are known as columns.
enum class MmaPass { kLoss, kGradient, kKeys };

// Operand registers for the product. float elements are tf32 words; kExact splits each into high + low, two tf32
// numbers that together hold 22 bits.
template <int count, bool kExact>
struct MmaWords {
  uint32_t high[count];
  uint32_t low[kExact ? count : 1];
};

template <typename Element, bool kExact, int count>
__device__ __forceinline__ MmaWords<count, kExact> mma_words(const uint32_t (&raw)[count]) {
  MmaWords<count, kExact> words;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<Element, float>) {
      words.high[i] = round_to_tf32(raw[i]);
      if constexpr (kExact) {
        words.low[i] = __float_as_uint(__uint_as_float(raw[i]) - __uint_as_float(words.high[i]));
      }
    } else {
      words.high[i] = raw[i];
    }
  }
  return words;
}

// d += a b, with b the registers [at] and [at + 1] of its words. kExact: the low * low term is below float's rounding.
template <typename Element, bool kExact, int count>
__device__ __forceinline__ void multiply(float (&d)[4], const MmaWords<4, kExact>& a, const MmaWords<count, kExact>& b,
                                         int at) {
  if constexpr (kExact) {
    mma(Element{}, d, a.low, b.high[at], b.high[at + 1]);
    mma(Element{}, d, a.high, b.low[at], b.low[at + 1]);
  }
  mma(Element{}, d, a.high, b.high[at], b.high[at + 1]);
}

// s [16, kKeys] = this warp's columns of Q K^T.
//
// Tensor cores round sums towards zero, a bias that grows with the number of terms. So exact products accumulate there
// over only a few steps (here) or one tile (of P K), and ordinary additions add up the results.
template <typename Element, bool kExact, typename Tile>
__device__ __forceinline__ void multiply_scores(float (&s)[Tile::kKeys / 8][4], uint32_t (&query)[Tile::kSteps][4],
                                                SharedAddress keys, int lane) {
  // Matrices of one ldmatrix: keys 0-7 chunk 0, keys 0-7 chunk 1, keys 8-15 chunk 0, keys 8-15 chunk 1.
  const SharedAddress row = keys + (lane % 8 + lane / 16 * 8) * Tile::kRowBytes;
  const int chunk = lane / 8 % 2;
  constexpr int kStepsTogether = kExact ? 4 : Tile::kSteps;
#pragma unroll
  for (int first = 0; first < Tile::kSteps; first += kStepsTogether) {
    float sum[Tile::kKeys / 8][4] = {};
#pragma unroll
    for (int step = first; step < first + kStepsTogether; ++step) {
      if constexpr (kExact) {  // split again for every tile: both halves of all queries do not fit in registers
#pragma unroll
        for (int i = 0; i < 4; ++i) opaque(query[step][i]);
      }
      const MmaWords<4, kExact> a = mma_words<Element, kExact>(query[step]);
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 16; ++j) {
        uint32_t raw[4];
        ldmatrix_x4(raw, row + 16 * j * Tile::kRowBytes + ((2 * step + chunk) ^ (lane % 8)) * 16);
        const MmaWords<4, kExact> b = mma_words<Element, kExact>(raw);
        multiply<Element, kExact>(sum[2 * j], a, b, 0);
        multiply<Element, kExact>(sum[2 * j + 1], a, b, 2);
      }
    }
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = first == 0 ? sum[j][i] : s[j][i] + sum[j][i];
    }
  }
}

// o [16, kWarpColumns] += P K, 16-bit: the packed accumulators of two adjacent 8-key tiles of S already are an A
// operand, and ldmatrix.trans makes the B operand from the rows that S read.
template <typename Element, typename Tile>
__device__ __forceinline__ void multiply_keys_packed(float (&o)[Tile::kWarpColumns / 8][4],
                                                     const float (&p)[Tile::kKeys / 8][4], SharedAddress keys,
                                                     int lane) {
  const Element type{};
  // Matrices of one ldmatrix: keys 0-7 chunk 0, keys 8-15 chunk 0, keys 0-7 chunk 1, keys 8-15 chunk 1.
  const SharedAddress row = keys + lane % 16 * Tile::kRowBytes;
  const int chunk = lane / 16;
#pragma unroll
  for (int j = 0; j < Tile::kKeys / 16; ++j) {
    const uint32_t a[4] = {pack(p[2 * j][0], p[2 * j][1], type), pack(p[2 * j][2], p[2 * j][3], type),
                           pack(p[2 * j + 1][0], p[2 * j + 1][1], type), pack(p[2 * j + 1][2], p[2 * j + 1][3], type)};
#pragma unroll
    for (int i = 0; i < Tile::kWarpColumns / 16; ++i) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, row + 16 * j * Tile::kRowBytes + ((2 * i + chunk) ^ (lane % 8)) * 16);
      mma(type, o[2 * i], a, b[0], b[1]);
      mma(type, o[2 * i + 1], a, b[2], b[3]);
    }
  }
}

// The same for float. The contraction may be in any order, so its index t stands for key 2t, and t + 4 for key 2t + 1:
// the accumulators of S then already are the A operand. Within 32 columns, column 4g + u is column g of output tile u,
// so that a lane loads its B words of four tiles with one 16-byte load, and its eight outputs are adjacent.
template <bool kExact, typename Tile>
__device__ __forceinline__ void multiply_keys_tf32(float (&o)[Tile::kWarpColumns / 8][4],
                                                   const float (&p)[Tile::kKeys / 8][4], SharedAddress keys, int lane) {
  const int even_key = lane % 4 * 2;
  const SharedAddress even_row = keys + even_key * Tile::kRowBytes;
#pragma unroll
  for (int i = 0; i < Tile::kWarpColumns / 32; ++i) {
    float tile[4][4] = {};
    float (*sum)[4] = kExact ? tile : &o[4 * i];
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
      const uint32_t raw_a[4] = {__float_as_uint(p[j][0]), __float_as_uint(p[j][2]), __float_as_uint(p[j][1]),
                                 __float_as_uint(p[j][3])};
      const MmaWords<4, kExact> a = mma_words<float, kExact>(raw_a);
      uint32_t even[4];
      uint32_t odd[4];
      const SharedAddress row = even_row + 8 * j * Tile::kRowBytes;
      load_shared_16(even, row + ((8 * i + lane / 4) ^ even_key) * 16);
      load_shared_16(odd, row + Tile::kRowBytes + ((8 * i + lane / 4) ^ (even_key + 1)) * 16);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const uint32_t raw_b[2] = {even[u], odd[u]};
        multiply<float, kExact>(sum[u], a, mma_words<float, kExact>(raw_b), 0);
      }
    }
    if constexpr (kExact) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int r = 0; r < 4; ++r) o[4 * i + u][r] += tile[u][r];
      }
    }
  }
}

// Scores of kKeys -> weights of the queries in the gradient of each key.
template <int tiles>
__device__ __forceinline__ void weigh_columns(float (&s)[tiles][4], const InfoNceColumn* columns, float scale,
                                              const InfoNceMask& mask, int64_t row, int64_t n, int64_t first_key,
                                              int valid, int lane) {
  // A lane loads one of every 32 columns and shares it by shuffles: all columns that it needs do not fit in registers.
  constexpr int kLoads = (tiles * 8 + 31) / 32;
  InfoNceColumn loaded[kLoads];
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    const int key = 32 * u + lane;
    loaded[u] = key < valid ? columns[first_key + key] : InfoNceColumn{};  // gives weight 0
  }
#pragma unroll
  for (int j = 0; j < tiles; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int source = j * 8 % 32 + lane % 4 * 2 + i;
      const InfoNceColumn& from = loaded[j / 4];
      const float lse = __shfl_sync(0xffffffffu, from.lse, source);
      const float upstream = __shfl_sync(0xffffffffu, from.upstream, source);
      const float floor = __shfl_sync(0xffffffffu, from.floor, source);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& x = s[j][2 * r + i];
        x = upstream * exp2_approx(x * scale - lse) - floor;
      }
    }
  }
  const MaskBits<tiles> bits = mask_bits<tiles>(mask, row, n, first_key, valid, lane);
  const auto masked = bits.positive | (mask.same_id_positive ? 0 : bits.same_id);
#pragma unroll
  for (int at = 0; at < tiles * 4; ++at) {
    if (masked >> at & 1) s[at / 4][at % 4] = 0.0f;
  }
}

template <typename Element, bool kExact, int columns, MmaPass kPass>
__global__ void __launch_bounds__(MmaTile<Element, kExact, columns>::kThreads)
    info_nce_mma_kernel(const MmaArguments<Element> arguments) {
  let_next_kernel_start();
  constexpr bool kGradient = kPass != MmaPass::kLoss;
  using Tile = MmaTile<Element, kExact, columns>;
  MOCO_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int column_group = warp / Tile::kRowWarps;
  const int64_t n = arguments.n;
  const int64_t k = arguments.count.value();
  const int64_t all_tiles = (k + Tile::kKeys - 1) / Tile::kKeys;
  const int first_tile = static_cast<int>(all_tiles * blockIdx.y / gridDim.y);
  const int tiles = static_cast<int>(all_tiles * (blockIdx.y + 1) / gridDim.y) - first_tile;
  const int split_keys = static_cast<int>(
      min(k - static_cast<int64_t>(first_tile) * Tile::kKeys, static_cast<int64_t>(tiles) * Tile::kKeys));
  const auto valid_keys = [&](int tile) {  // in this split's tile; only the last one of the queue may not be full
    return min(split_keys - tile * Tile::kKeys, Tile::kKeys);
  };
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * Tile::kRows;
  const int64_t row = block_row + warp % Tile::kRowWarps * 16 + lane / 4;  // and row + 8

  // Each thread loads one chunk of every kRowsAtOnce-th key of a tile.
  constexpr int kRowsAtOnce = Tile::kThreads / Tile::kRowChunks;
  const int load_key = thread / Tile::kRowChunks;
  const int load_chunk = thread % Tile::kRowChunks;
  const SharedAddress ring = shared_address(shared);
  const char* const source = reinterpret_cast<const char*>(arguments.queue) +
                             (static_cast<int64_t>(first_tile) * Tile::kKeys + load_key) * Tile::kRowBytes +
                             load_chunk * 16;
  const auto load_tile = [&](int tile) {
    if (tile < tiles) {
      const SharedAddress stage = ring + tile % Tile::kStages * Tile::kTileBytes;
      const int valid = valid_keys(tile);
#pragma unroll
      for (int i = 0; i < Tile::kKeys; i += kRowsAtOnce) {
        const int key = load_key + i;
        const char* const row = source + static_cast<int64_t>(tile) * Tile::kTileBytes + i * Tile::kRowBytes;
        cp_async_16(stage + key * Tile::kRowBytes + (load_chunk ^ (key % 8)) * 16,
                    key < valid ? row : reinterpret_cast<const char*>(arguments.queue), key < valid);
      }
    }
    cp_async_commit();  // also an empty group, because the wait below counts groups
  };
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) load_tile(i);
  wait_for_previous_kernel();  // it writes the query, but not the keys: see InfoNceMask::of_batch

  uint32_t query[Tile::kSteps][4];
  {
    constexpr int kRowWords = Tile::kRowBytes / 4;
    const uint32_t* words = arguments.query + row * kRowWords + column_group * (Tile::kWarpBytes / 4) + lane % 4;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) query[step][i] = words[i % 2 * 8 * kRowWords + step * 8 + i / 2 * 4];
    }
  }
  constexpr int kBias =
      std::is_same_v<Element, __half> && kPass != MmaPass::kKeys ? 12 : 0;  // keeps p >= 2^-26 above fp16's subnormals
  SoftmaxRows rows;
  const float log2_scale = 1.44269504f / arguments.temperature.value();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (kPass == MmaPass::kKeys) break;
    const float row_scale = arguments.row_scale[row + 8 * r];
    rows.positive[r] = arguments.positive[row + 8 * r] / row_scale;
    rows.scale[r] = row_scale * log2_scale;
    rows.max[r] = -INFINITY;
    rows.sum[r] = 0.0f;
    rows.rank[r] = 0;
  }
  constexpr int kOutputs = kGradient ? Tile::kWarpColumns / 8 : 1;
  float o[kOutputs][4] = {};

  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the whole tile is there, and no thread still reads the stage that the next load overwrites
    load_tile(tile + Tile::kStages - 1);
    const SharedAddress keys = ring + tile % Tile::kStages * Tile::kTileBytes + column_group * Tile::kWarpBytes;

    float s[Tile::kKeys / 8][4];
    multiply_scores<Element, kExact, Tile>(s, query, keys, lane);
    if constexpr (Tile::kColumnGroups > 1) {
      float4* exchange = reinterpret_cast<float4*>(shared + Tile::kStages * Tile::kTileBytes) + lane;
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 8; ++j) {
        exchange[(warp * (Tile::kKeys / 8) + j) * 32] = make_float4(s[j][0], s[j][1], s[j][2], s[j][3]);
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 8; ++j) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int group = 0; group < Tile::kColumnGroups; ++group) {  // in the same order in all warps, for equal bits
          const int other = group * Tile::kRowWarps + warp % Tile::kRowWarps;
          const float4 part = exchange[(other * (Tile::kKeys / 8) + j) * 32];
          sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
        }
        s[j][0] = sum.x, s[j][1] = sum.y, s[j][2] = sum.z, s[j][3] = sum.w;
      }
    }
    const int64_t first_key = static_cast<int64_t>(first_tile + tile) * Tile::kKeys;
    if constexpr (kPass == MmaPass::kKeys) {
      weigh_columns<Tile::kKeys / 8>(s, arguments.columns, log2_scale, arguments.mask, row, n, first_key,
                                     valid_keys(tile), lane);
      if constexpr (std::is_same_v<Element, float>) {
        multiply_keys_tf32<kExact, Tile>(o, s, keys, lane);
      } else {
        multiply_keys_packed<Element, Tile>(o, s, keys, lane);
      }
      continue;
    }
    if (const int valid = valid_keys(tile); valid < Tile::kKeys) drop_scores(s, valid, lane);
    if (arguments.mask.any()) {
      mask_scores<Tile::kKeys / 8>(s, rows, arguments.mask, row, n, first_key, valid_keys(tile), lane);
    }
    online_softmax<Tile::kKeys / 8, kBias>(s, o, rows);
    if constexpr (kGradient && std::is_same_v<Element, float>) {
      multiply_keys_tf32<kExact, Tile>(o, s, keys, lane);
    } else if constexpr (kGradient) {
      multiply_keys_packed<Element, Tile>(o, s, keys, lane);
    }
  }

  constexpr float kUnbias = 1.0f / (1 << kBias);
  join_lanes(rows);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= n) continue;
    const int64_t slot = blockIdx.y * n + row + 8 * r;
    if (kPass != MmaPass::kKeys && column_group == 0 && lane % 4 == 0) {
      arguments.partials.max[slot] = rows.max[r];
      arguments.partials.sum[slot] = rows.sum[r] * kUnbias;
      arguments.partials.rank[slot] = rows.rank[r];
    }
    if constexpr (kGradient) {
      float* out = arguments.partials.keys + slot * columns + column_group * Tile::kWarpColumns;
      if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
        for (int i = 0; i < kOutputs; i += 4) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            *reinterpret_cast<float4*>(out + 8 * i + lane % 4 * 8 + 4 * h) =
                make_float4(o[i][2 * r + h], o[i + 1][2 * r + h], o[i + 2][2 * r + h], o[i + 3][2 * r + h]);
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
          *reinterpret_cast<float2*>(out + 8 * i + lane % 4 * 2) =
              make_float2(o[i][2 * r] * kUnbias, o[i][2 * r + 1] * kUnbias);
        }
      }
    }
  }
}

}  // namespace moco_ext::cuda
