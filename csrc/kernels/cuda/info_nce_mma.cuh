// The InfoNCE pass over the queue on tensor cores (sm_80 and newer): attention whose values are its keys.
//
// A block handles kRows queries and one split of the queue, and loads key tiles through a cp.async ring. The same tile
// is the operand of both products, S = Q K^T and O += P K. A warp handles 16 or 32 rows and up to 128 columns. Longer
// rows are divided among kColumnGroups warps, which add up their parts of S through shared memory, so that query
// fragments and O stay in registers for every C. A block writes its partial results once, at its end.
#pragma once

#include <type_traits>

#include "kernels/cuda/info_nce_mma_products.cuh"
#include "kernels/cuda/info_nce_softmax.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {

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
        x = upstream * exp2_approx(at_most_zero(x * scale - lse)) - floor;  // huge scores differ by rounding
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

// kMasked: some keys may not be negatives of all rows.
template <typename Tile, int columns, MmaPass kPass, bool kMasked>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kThreads <= 128 ? 2 : 1)
    info_nce_mma_kernel(const MmaArguments<typename Tile::Element> arguments) {
  using Element = typename Tile::Element;
  using Operand = typename Tile::Operand;
  let_next_kernel_start();
  constexpr bool kGradient = kPass != MmaPass::kLoss;
  constexpr bool kFloat = std::is_same_v<Element, float>;
  constexpr int kTerms = Tile::kTerms;
  MOCO_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int column_group = thread / 32 / Tile::kRowWarps;
  const int64_t n = arguments.n;
  const int64_t k = arguments.count.value();
  const auto all_tiles = static_cast<unsigned>((k + Tile::kKeys - 1) / Tile::kKeys);
  const unsigned more = all_tiles % gridDim.y;  // splits with one tile more than the others
  const int first_tile = static_cast<int>(all_tiles / gridDim.y * blockIdx.y + min(blockIdx.y, more));
  const int end_tile = static_cast<int>(first_tile + all_tiles / gridDim.y + (blockIdx.y < more));
  const int last_keys =
      static_cast<int>(min(k - static_cast<int64_t>(end_tile - 1) * Tile::kKeys, int64_t{Tile::kKeys}));
  const auto valid_keys = [&](int tile) { return tile < end_tile - 1 ? Tile::kKeys : last_keys; };
  // The first of a thread's rows: its others are 8, 16 and 24 further.
  const auto first_row = [](int thread) {
    return static_cast<int64_t>(blockIdx.x) * Tile::kRows + thread / 32 % Tile::kRowWarps * Tile::kWarpRows +
           thread % 32 / 4;
  };
  const int64_t row = first_row(thread);
  const bool idle = row - lane / 4 >= n;  // the warp only loads and splits keys

  // Each thread loads one chunk of every kRowsAtOnce-th key of a tile.
  constexpr int kRowsAtOnce = Tile::kThreads / Tile::kSourceChunks;
  const auto stage = [&](int tile) { return shared + tile % Tile::kStages * Tile::kStageBytes; };
  const auto third = [&](int tile) {
    return shared + Tile::kStages * Tile::kStageBytes + (Tile::kThirds == 2 ? tile % 2 * Tile::kTileBytes : 0);
  };
  const auto load_tile = [&](int tile) {
    if (tile < end_tile) {
      const int at = opaque(thread);  // computing addresses again for every tile saves registers
      const int load_key = at / Tile::kSourceChunks;
      const int load_chunk = at % Tile::kSourceChunks;
      const char* const source =
          reinterpret_cast<const char*>(arguments.queue) + static_cast<int64_t>(tile) * Tile::kStageBytes + at * 16;
      const int term = kFloat ? load_chunk % 2 : 0;  // the one whose tile the chunk is loaded to
      const SharedAddress to = shared_address(stage(tile)) + term * Tile::kTileBytes;
      const int valid = valid_keys(tile);
#pragma unroll 4
      for (int i = 0; i < Tile::kKeys; i += kRowsAtOnce) {
        const int key = load_key + i;
        cp_async_16(to + key * Tile::kRowBytes + chunk_offset(kFloat ? load_chunk / 2 : load_chunk, key, term),
                    source + i * Tile::kSourceBytes, key < valid);
      }
    }
    cp_async_commit();  // also an empty group, because the wait below counts groups
  };
  TermScale scale;
  // Replaces eight adjacent floats, a chunk in each of the two tiles, by their terms. A warp splits what it has loaded.
  const auto split_tile = [&](int tile) {
    __syncwarp();  // after each lane has waited for its own loads
    const int at = opaque(thread);
    const int pair = at / 32 * 16 + at % 16;
#pragma unroll 1
    for (int i = 0; i < Tile::kKeys; i += 2 * kRowsAtOnce) {
      const int key = i + at / 16 % 2 * kRowsAtOnce + pair / (Tile::kSourceChunks / 2);
      const int chunk = pair % (Tile::kSourceChunks / 2);
      uint4* terms[3];
#pragma unroll
      for (int t = 0; t < 3; ++t) {
        unsigned char* const to = t < 2 ? stage(tile) + t * Tile::kTileBytes : third(tile);
        terms[t] = reinterpret_cast<uint4*>(to + key * Tile::kRowBytes + chunk_offset(chunk, key, t));
      }
      float4 x = *reinterpret_cast<const float4*>(terms[0]);
      float4 y = *reinterpret_cast<const float4*>(terms[1]);
      if constexpr (Tile::kScaled) scale.apply(x), scale.apply(y);
      uint32_t words[4][kTerms];
      split<Operand>(x.x, x.y, words[0]);
      split<Operand>(x.z, x.w, words[1]);
      split<Operand>(y.x, y.y, words[2]);
      split<Operand>(y.z, y.w, words[3]);
#pragma unroll
      for (int t = 0; t < kTerms; ++t) *terms[t] = make_uint4(words[0][t], words[1][t], words[2][t], words[3][t]);
    }
  };
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) load_tile(first_tile + i);
  wait_for_previous_kernel();  // it writes the query, but not the keys: see InfoNceMask::of_batch

  uint32_t queries[kTerms][Tile::kRowTiles][Tile::kSteps][4];
  unsigned char* const own_queries = shared + Tile::kSharedBytes - Tile::kQueryBytes + 16 * thread;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      uint32_t words[4][kTerms];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at = (row + 16 * m + i % 2 * 8) * columns + column_group * Tile::kWarpColumns + step * 16 +
                           i / 2 * 8 + lane % 4 * 2;
        if constexpr (kFloat) {
          const float2 pair = *reinterpret_cast<const float2*>(arguments.query + at);
          split<Operand>(pair.x * Tile::kScale, pair.y * Tile::kScale, words[i]);
        } else {
          words[i][0] = arguments.query[at / 2];
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * Tile::kRegisterTerms; ++i) queries[i / 4][m][step][i % 4] = words[i % 4][i / 4];
      if constexpr (Tile::kRegisterTerms < kTerms) {
        *reinterpret_cast<uint4*>(own_queries + (m * Tile::kSteps + step) * Tile::kThreads * 16) =
            make_uint4(words[0][kTerms - 1], words[1][kTerms - 1], words[2][kTerms - 1], words[3][kTerms - 1]);
      }
    }
  }
  const auto query = [&](uint32_t (&a)[4], int t, int m, int step) {
    if (t < Tile::kRegisterTerms) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = queries[t][m][step][i];
    } else {
      load_shared_16(a, shared_address(own_queries) + (m * Tile::kSteps + step) * Tile::kThreads * 16);
    }
  };
  constexpr int kBias = kPass == MmaPass::kKeys ? 0 : kWeightBias<Operand>;
  SoftmaxRows rows[Tile::kRowTiles];
  const float log2_scale = 1.44269504f / arguments.temperature.value();
#pragma unroll
  for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
    if constexpr (kPass == MmaPass::kKeys) break;
    SoftmaxRows& of = rows[i / 2];
    const float row_scale = arguments.row_scale[row + 8 * i];
    const float score_scale = row_scale / (Tile::kScale * Tile::kScale);
    of.positive[i % 2] = arguments.positive[row + 8 * i] / score_scale;
    of.scale[i % 2] = score_scale * log2_scale;
    of.max[i % 2] = -INFINITY;
    of.sum[i % 2] = 0.0f;
    of.rank[i % 2] = 0;
  }
  constexpr int kOutputs = kGradient ? Tile::kWarpColumns / 8 : 1;
  float o[Tile::kRowTiles][kOutputs][4] = {};
  float factor_of_sums = 1.0f;

  for (int tile = first_tile; tile < end_tile; ++tile) {
    if constexpr (Tile::kStages == 1) {
      __syncthreads();  // no thread still reads the only stage
      load_tile(tile);
    }
    cp_async_wait<Tile::kStages == 1 ? 0 : Tile::kStages - 2>();
    if constexpr (kFloat) split_tile(tile);
    // The whole tile is there, and no thread still reads the stage that the next load overwrites.
    if constexpr (Tile::kScaled) {
      while (!scale.fits([](bool x) { return __syncthreads_or(x) != 0; })) {
        load_tile(tile);
        cp_async_wait<0>();
        split_tile(tile);
      }
    } else {
      __syncthreads();
    }
    if constexpr (Tile::kStages > 1) load_tile(tile + Tile::kStages - 1);
    const int at = opaque(thread);
    const int lane = at % 32;
    const int row_warp = at / 32 % Tile::kRowWarps;
    const int column_group = at / 32 / Tile::kRowWarps;
    SharedAddress keys[kTerms];
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      keys[t] = shared_address(t < 2 ? stage(tile) + t * Tile::kTileBytes : third(tile)) +
                column_group * Tile::kWarpColumns * 2;
    }

    float s[Tile::kRowTiles][Tile::kKeys / 8][4];
    if (!idle) multiply_scores<Tile>(s, query, keys, lane);
    if constexpr (Tile::kColumnGroups > 1) {
      constexpr int kParts = Tile::kRowTiles * Tile::kKeys / 8;
      float4* exchange =
          reinterpret_cast<float4*>(shared + Tile::kSharedBytes - Tile::kQueryBytes - Tile::kExchangeBytes) + lane;
#pragma unroll
      for (int i = 0; i < kParts && !idle; ++i) {
        const auto& part = s[i % Tile::kRowTiles][i / Tile::kRowTiles];
        exchange[(at / 32 * kParts + i) * 32] = make_float4(part[0], part[1], part[2], part[3]);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 2
        for (int group = 0; group < Tile::kColumnGroups; ++group) {  // in the same order in all warps, for equal bits
          const float4 part = exchange[((group * Tile::kRowWarps + row_warp) * kParts + i) * 32];
          sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
        }
        auto& to = s[i % Tile::kRowTiles][i / Tile::kRowTiles];
        to[0] = sum.x, to[1] = sum.y, to[2] = sum.z, to[3] = sum.w;
      }
    }
    if (idle) continue;
    const int64_t row = first_row(at);
    const int64_t first_key = static_cast<int64_t>(tile) * Tile::kKeys;
    const int valid = valid_keys(tile);
    const float factor = Tile::kScaled ? scale.to_unit_rows() : 1.0f;  // of scores and sums
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      rescale_tile(s[m], factor);
      if constexpr (kPass == MmaPass::kKeys) {
        weigh_columns(s[m], arguments.columns, log2_scale, arguments.mask, row + 16 * m, n, first_key, valid, lane);
      } else {
        if (valid < Tile::kKeys) drop_scores(s[m], valid, lane);
        if constexpr (kMasked) {
          mask_scores(s[m], rows[m], arguments.mask, row + 16 * m, n, first_key, valid, lane);
        }
        online_softmax<Tile::kKeys / 8, kBias>(s[m], o[m], rows[m]);
      }
    }
    // Weights of kKeys have any sign, and differences of their sums count: two terms already for two of S.
    if constexpr (kGradient) {
      constexpr int kWeightTerms = Tile::kExact || (kTerms == 2 && kPass == MmaPass::kKeys) ? 2 : 1;
      if (Tile::kScaled && !Tile::kExact && factor != factor_of_sums) {
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m) rescale_tile(o[m], factor_of_sums / factor);
        factor_of_sums = factor;
      }
      multiply_keys<Tile, kWeightTerms>(o, s, keys, factor, lane);
    }
  }

  constexpr float kUnbias = 1.0f / (1 << kBias);
  const int at = opaque(thread);
  const int first_column = at / 32 / Tile::kRowWarps * Tile::kWarpColumns + at % 4 * 2;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
    rescale_tile(o[m], factor_of_sums);
    join_lanes(rows[m]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t this_row = first_row(at) + 16 * m + 8 * r;
      if (this_row >= n) continue;
      const int64_t slot = arguments.partials.slot(this_row, blockIdx.y);
      if (kPass != MmaPass::kKeys && first_column == 0) {
        arguments.partials.max[slot] = rows[m].max[r] / (Tile::kScale * Tile::kScale);
        arguments.partials.sum[slot] = rows[m].sum[r] * kUnbias;
        arguments.partials.rank[slot] = rows[m].rank[r];
      }
      if constexpr (kGradient) {
        float* out = arguments.partials.keys + slot * columns + first_column;
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
          *reinterpret_cast<float2*>(out + 8 * i) =
              make_float2(o[m][i][2 * r] * (kUnbias / Tile::kScale), o[m][i][2 * r + 1] * (kUnbias / Tile::kScale));
        }
      }
    }
  }
}

}  // namespace moco_ext::cuda
