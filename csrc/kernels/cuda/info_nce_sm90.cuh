// The InfoNCE pass over the queue for Hopper: the pass of info_nce_mma.cuh with warpgroup products and tensor copies.
//
// A block handles 128 queries and one split of the queue. One thread fetches key tiles into a ring; two warpgroups of
// 64 rows each read a tile twice, as the operand of S = Q K^T (rows) and of O += P K (columns). Scores, P and O stay in
// registers. A softmax overlaps with products of its own warpgroup and of the other one (the order of
// FlashAttention-3):
//   issue S(j+1) -> issue O += P(j) K -> wait for S -> softmax of S(j+1) -> wait for O -> release tile j -> rescale O
#pragma once

#include <type_traits>

#include "kernels/cuda/info_nce_sm90_launch.cuh"
#include "kernels/cuda/info_nce_softmax.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/sm90.cuh"

namespace moco_ext::cuda {

template <int columns>
struct Sm90Tile {
  static constexpr int kRows = kSm90Rows;                  // half of them per warpgroup
  static constexpr int kKeys = columns <= 128 ? 128 : 64;  // limited by the registers of S besides O
  static constexpr int kPanels = columns / 64;
  static constexpr int kKeyPanelBytes = kKeys * 128;
  static constexpr int kTileBytes = kPanels * kKeyPanelBytes;
  static constexpr int kQueryPanelBytes = kRows * 128;
  static constexpr int kQueryBytes = kPanels * kQueryPanelBytes;
  static constexpr int kStages = columns == 64 ? 8 : columns == 128 ? 5 : 4;
  static constexpr int kThreads = 3 * 128;
  static constexpr int kSharedBytes = 1024 + kQueryBytes + kStages * kTileBytes + (2 * kStages + 1) * 8;
  static_assert(kSharedBytes <= 227 * 1024);
};

struct Sm90Arguments {
  CUtensorMap query;  // boxes of [128 rows, 64 columns] of the query operand
  CUtensorMap keys;   // boxes of [kKeys rows, 64 columns]
  const float* positive;
  const float* row_scale;
  InfoNcePartials partials;
  int64_t n;
  InfoNceKeyCount count;
  InfoNceMask mask;
  InfoNceTemperature temperature;
};

template <typename Element, int columns, bool kGradient, bool kMasked>
__global__ void __launch_bounds__(Sm90Tile<columns>::kThreads, 1)
    info_nce_sm90_kernel(const __grid_constant__ Sm90Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = Sm90Tile<columns>;
  MOCO_DYNAMIC_SHARED(shared);
  const uint32_t query = (sm90::shared_address(shared) + 1023u) & ~1023u;
  const uint32_t ring = query + Tile::kQueryBytes;
  const uint32_t full = ring + Tile::kStages * Tile::kTileBytes;  // [kStages] barriers: the tile has arrived
  const uint32_t empty = full + Tile::kStages * 8;                // [kStages]: both warpgroups have read it
  const uint32_t query_arrived = empty + Tile::kStages * 8;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t k = arguments.count.value();
  const int64_t all_tiles = (k + Tile::kKeys - 1) / Tile::kKeys;
  const int first_tile = static_cast<int>(all_tiles * blockIdx.y / gridDim.y);
  const int tiles = static_cast<int>(all_tiles * (blockIdx.y + 1) / gridDim.y) - first_tile;

  if (thread == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      sm90::barrier_init(full + 8 * i, 1);
      sm90::barrier_init(empty + 8 * i, 2);
    }
    sm90::barrier_init(query_arrived, 1);
    sm90::barrier_init_done();
  }
  __syncthreads();

  if (thread < 128) {
    sm90::release_registers<24>();
    if (thread == 0) {
      sm90::prefetch_map(arguments.query);
      sm90::prefetch_map(arguments.keys);
      sm90::barrier_expect(query_arrived, Tile::kQueryBytes);
      for (int p = 0; p < Tile::kPanels; ++p) {
        sm90::copy_tensor(query + p * Tile::kQueryPanelBytes, arguments.query, 64 * p,
                          static_cast<int>(blockIdx.x) * Tile::kRows, query_arrived);
      }
      for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % Tile::kStages;
        sm90::barrier_wait(empty + 8 * stage, sm90::empty_parity(tile, Tile::kStages));
        sm90::barrier_expect(full + 8 * stage, Tile::kTileBytes);
        for (int p = 0; p < Tile::kPanels; ++p) {
          sm90::copy_tensor(ring + stage * Tile::kTileBytes + p * Tile::kKeyPanelBytes, arguments.keys, 64 * p,
                            (first_tile + tile) * Tile::kKeys, full + 8 * stage);
        }
      }
    }
  } else {
    sm90::claim_registers<240>();
    const Element type{};
    const int group = thread / 128 - 1;
    const int lane = thread % 32;
    const int64_t n = arguments.n;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * Tile::kRows + group * 64 + thread % 128 / 32 * 16 + lane / 4;
    constexpr int kBias = std::is_same_v<Element, __half> ? 12 : 0;  // keeps p >= 2^-26 above fp16's subnormals
    SoftmaxRows rows;
    const float log2_scale = 1.44269504f / arguments.temperature.value();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float row_scale = arguments.row_scale[row + 8 * r];
      rows.positive[r] = arguments.positive[row + 8 * r] / row_scale;
      rows.scale[r] = row_scale * log2_scale;
      rows.max[r] = -INFINITY;
      rows.sum[r] = 0.0f;
      rows.rank[r] = 0;
    }
    const int split_keys = static_cast<int>(
        min(k - static_cast<int64_t>(first_tile) * Tile::kKeys, static_cast<int64_t>(tiles) * Tile::kKeys));

    constexpr int kScores = Tile::kKeys / 8;
    constexpr int kOutputs = kGradient ? columns / 8 : 1;
    float s[kScores][4] = {};
    float o[kOutputs][4] = {};
    const auto tile_address = [&](int tile) { return ring + tile % Tile::kStages * Tile::kTileBytes; };
    const auto wait_for = [&](int tile) {
      sm90::barrier_wait(full + 8 * (tile % Tile::kStages), sm90::full_parity(tile, Tile::kStages));
    };
    const auto issue_scores = [&](int tile) {  // S = Q K^T
#pragma unroll
      for (int step = 0; step < columns / 16; ++step) {  // 16 columns are 32 bytes of a panel's row
        const int panel = step / 4;
        const uint32_t bytes = step % 4 * 32;
        sm90::multiply_rows(s, sm90::row_operand(query + panel * Tile::kQueryPanelBytes + group * 64 * 128 + bytes),
                            sm90::row_operand(tile_address(tile) + panel * Tile::kKeyPanelBytes + bytes), step > 0,
                            type);
      }
    };
    uint32_t p[Tile::kKeys / 16][4] = {};
    const auto issue_outputs = [&](int tile) {  // O += P K
      if constexpr (kGradient) {
#pragma unroll
        for (int j = 0; j < Tile::kKeys / 16; ++j) {  // 16 keys are two groups of 8 rows
          sm90::multiply_columns(o, p[j], sm90::column_operand(tile_address(tile) + j * 2048, Tile::kKeyPanelBytes), 1,
                                 type);
        }
      }
    };
    float rescale[2];
    const auto take_softmax = [&](int tile) {
      const int valid = min(split_keys - tile * Tile::kKeys, Tile::kKeys);
      if (valid < Tile::kKeys) drop_scores(s, valid, lane);
      if constexpr (kMasked) {
        const int64_t first_key = static_cast<int64_t>(first_tile + tile) * Tile::kKeys;
        mask_scores<kScores>(s, rows, arguments.mask, row, n, first_key, valid, lane);
      }
      return softmax_of_tile<kBias>(s, rows, rescale);
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 16; ++j) {  // two adjacent tiles of S already are an operand
        p[j][0] = pack(s[2 * j][0], s[2 * j][1], type);
        p[j][1] = pack(s[2 * j][2], s[2 * j][3], type);
        p[j][2] = pack(s[2 * j + 1][0], s[2 * j + 1][1], type);
        p[j][3] = pack(s[2 * j + 1][2], s[2 * j + 1][3], type);
      }
    };
    // A weight of 0 does not remove a key that is not finite, and num_valid may end before such keys of the last tile.
    // Both warpgroups write the same zeros, and scores of these keys are dropped, so neither has to wait for the other.
    const auto clear_invalid_keys = [&](int tile) {
      const int valid = min(split_keys - tile * Tile::kKeys, Tile::kKeys);
      if (!kGradient || valid == Tile::kKeys) return;
      constexpr int kChunks = Tile::kTileBytes / Tile::kKeys / 16;
      for (int i = valid * kChunks + thread % 128; i < Tile::kKeys * kChunks; i += 128) {
        sm90::store_shared_16(tile_address(tile) + sm90::chunk_offset(i / kChunks, i % kChunks, Tile::kKeyPanelBytes),
                              {0, 0, 0, 0});
      }
      sm90::fence_shared();
      sm90::warpgroup_barrier(1 + group);
    };
    // pin: while products run, the compiler may touch none of their registers. Otherwise it serializes them.
    const auto begin = [&] {
      sm90::pin(s);
      sm90::pin(o);
      sm90::pin(p);
      sm90::products_begin();
    };
    const auto wait_for_outputs = [&] {
      sm90::products_wait();
      sm90::pin(o);
      sm90::pin(p);
    };

    sm90::barrier_wait(query_arrived, 0);  // even without a tile: a block must not exit before its copies complete
    if (tiles > 0) {
      wait_for(0);
      begin();
      issue_scores(0);
      sm90::products_commit();
      sm90::products_wait();
      sm90::pin(s);
      take_softmax(0);
      pack_weights();
      for (int tile = 0; tile < tiles - 1; ++tile) {
        wait_for(tile + 1);
        begin();
        issue_scores(tile + 1);
        sm90::products_commit();
        issue_outputs(tile);
        sm90::products_commit();
        sm90::products_wait<1>();
        sm90::pin(s);
        const bool grew = take_softmax(tile + 1);
        wait_for_outputs();
        if (thread % 128 == 0) sm90::barrier_arrive(empty + 8 * (tile % Tile::kStages));
        if (grew) rescale_rows(o, rescale);
        pack_weights();
      }
      clear_invalid_keys(tiles - 1);
      begin();
      issue_outputs(tiles - 1);
      sm90::products_commit();
      wait_for_outputs();
    }

    constexpr float kUnbias = 1.0f / (1 << kBias);
    join_lanes(rows);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= n) continue;
      const int64_t slot = blockIdx.y * n + row + 8 * r;
      if (lane % 4 == 0) {
        arguments.partials.max[slot] = rows.max[r];
        arguments.partials.sum[slot] = rows.sum[r] * kUnbias;
        arguments.partials.rank[slot] = rows.rank[r];
      }
      if constexpr (kGradient) {
        float* const out = arguments.partials.keys + slot * columns;
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
          *reinterpret_cast<float2*>(out + 8 * i + lane % 4 * 2) =
              make_float2(o[i][2 * r] * kUnbias, o[i][2 * r + 1] * kUnbias);
        }
      }
    }
  }
#endif
}

}  // namespace moco_ext::cuda
