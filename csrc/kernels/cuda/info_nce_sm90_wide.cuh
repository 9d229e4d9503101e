// The Hopper pass for rows too wide for one warpgroup's registers: 16-bit queues of up to 768 columns, without masks.
//
// A block has 64 queries. One warpgroup computes the scores S = Q K^T and the softmax, and writes its weights P to
// shared memory. Two others sum up O += P K, half of the columns each, in their registers. A unit of the ring is what
// one of them reads of a tile. After its sums, the last to read the unit, it loads the unit that takes its place, so
// there is no producer. The scores' warpgroup, while the others add tile j - 1:
//   wait for S(j) -> issue the first part of S(j+1) -> softmax of S(j) -> P(j) to shared memory -> issue the rest
#pragma once

#include "kernels/cuda/info_nce_sm90_rows.cuh"

namespace moco_ext::cuda {

template <typename Queue, int columns>
struct Sm90WideTile {
  static_assert(sizeof(Queue) == 2);
  static constexpr int kKeys = kSm90WideKeys;
  static constexpr int kGroups = 2;
  static constexpr int kGroupColumns = columns / kGroups;
  static constexpr int kHalf = kGroupColumns / 2;  // columns of a product
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kQueryPanelBytes = kSm90GroupRows * 128;
  static constexpr int kQueryBytes = columns / 64 * kQueryPanelBytes;
  static constexpr int kKeyPanelBytes = kKeys * 128;
  static constexpr int kUnitPanels = kGroupColumns / 64;
  static constexpr int kUnitBytes = kUnitPanels * kKeyPanelBytes;
  static constexpr int kWeightBytes = kSm90GroupRows * 2 * kKeys * 2;  // of two tiles, side by side: [rows, 2 kKeys]
  static constexpr int kMaxSharedBytes = 227 * 1024;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kOtherBytes = 1024 + kBarrierBytes + 2 * kSm90GroupRows * 4;  // alignment, barriers, rescales
  static constexpr int kUnits = (kMaxSharedBytes - kOtherBytes - kQueryBytes - kWeightBytes) / kUnitBytes;
  // The ring holds two tiles and more. The first kAhead units of tile j+1 replace units of tile j-2 or earlier, the
  // rest may replace units of tile j-1. So only the first are multiplied before the softmax of tile j, which would
  // otherwise wait for the sums of tile j-1 and a load.
  static_assert(kUnits >= 2 * kGroups && (kUnits + 5) * 8 <= kBarrierBytes);
  static constexpr int kAhead = kUnits - 2 * kGroups < kGroups ? kUnits - 2 * kGroups : kGroups;
  static_assert(kAhead > 0);
  static constexpr int kDynamicBytes = kOtherBytes + kQueryBytes + kWeightBytes + kUnits * kUnitBytes;
  // The registers of a thread. The sums need O and 26 more (ptxas's minimum); the scores get the rest.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kSumRegisters = (kGroupColumns / 2 + 26 + 7) / 8 * 8;
  static constexpr int kScoreRegisters = (kGroups + 1) * kLaunchRegisters - kGroups * kSumRegisters;
};

template <typename Queue, int columns>
__device__ __forceinline__ void load_wide_query(uint32_t query, uint32_t arrived, const Sm90Arguments& arguments,
                                                int64_t block_row) {
  using Tile = Sm90WideTile<Queue, columns>;
  sm90::prefetch_map(arguments.query_map);
  sm90::barrier_expect(arrived, Tile::kQueryBytes);
  for (int p = 0; p < columns / 64; ++p) {
    sm90::copy_tensor(query + p * Tile::kQueryPanelBytes, arguments.query_map, 64 * p, static_cast<int>(block_row),
                      arrived);
  }
}

template <typename Queue, int columns, bool kGradient>
__global__ void __launch_bounds__(Sm90WideTile<Queue, columns>::kThreads, 1)
    info_nce_sm90_wide_kernel(const __grid_constant__ Sm90Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  let_next_kernel_start();
  using Tile = Sm90WideTile<Queue, columns>;
  constexpr int kGroups = Tile::kGroups;
  constexpr int kUnits = Tile::kUnits;
  MOCO_DYNAMIC_SHARED(unaligned);
  const uint32_t query = (sm90::shared_address(unaligned) + 1023u) & ~1023u;
  const uint32_t weights = query + Tile::kQueryBytes;
  const uint32_t ring = weights + Tile::kWeightBytes;
  const uint32_t full = ring + kUnits * Tile::kUnitBytes;  // [kUnits] barriers: the unit has arrived
  const uint32_t weights_full = full + kUnits * 8;         // [2]: P and rescales are written, S has been read
  const uint32_t weights_empty = weights_full + 2 * 8;     // [2]: all sums include P
  const uint32_t query_arrived = weights_empty + 2 * 8;
  const uint32_t rescales = full + Tile::kBarrierBytes;  // [2, rows] of O before P of a tile is added
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int group = __shfl_sync(0xffffffffu, thread / 128, 0) - 1;  // of columns; -1: the scores' warpgroup
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * kSm90GroupRows;
  const int row_of_block = thread % 128 / 32 * 16 + lane / 4;
  const int64_t row = block_row + row_of_block;
  const int64_t n = arguments.n;
  const int c = arguments.c;
  const int split = static_cast<int>(blockIdx.y);
  const int64_t k = arguments.count.value();
  const int64_t all_tiles = (k + Tile::kKeys - 1) / Tile::kKeys;
  const int first_tile = static_cast<int>(all_tiles * split / arguments.splits);
  const int tiles = static_cast<int>(all_tiles * (split + 1) / arguments.splits) - first_tile;
  // Of the last tile; all others are full.
  const int last_keys =
      static_cast<int>(min(k - static_cast<int64_t>(first_tile + tiles - 1) * Tile::kKeys, int64_t{Tile::kKeys}));
  constexpr int kBias = kWeightBias<Queue>;
  constexpr float kUnbias = 1.0f / (1 << kBias);
  const Queue type{};

  // Unit u of the block is columns u % kGroups of tile u / kGroups.
  const auto load = [&](int unit) {
    const uint32_t arrived = full + unit % kUnits * 8;
    sm90::barrier_expect(arrived, Tile::kUnitBytes);
    for (int p = 0; p < Tile::kUnitPanels; ++p) {
      sm90::copy_tensor(ring + unit % kUnits * Tile::kUnitBytes + p * Tile::kKeyPanelBytes, arguments.key_map,
                        unit % kGroups * Tile::kGroupColumns + 64 * p, (first_tile + unit / kGroups) * Tile::kKeys,
                        arrived);
    }
  };
  const auto wait_for = [&](int unit) {
    sm90::barrier_wait(full + unit % kUnits * 8, sm90::full_parity(unit, kUnits));
  };

  if (thread == 0) {
    for (int i = 0; i < kUnits; ++i) sm90::barrier_init(full + 8 * i, 1);
    for (int i = 0; i < 2; ++i) {
      sm90::barrier_init(weights_full + 8 * i, 128);
      sm90::barrier_init(weights_empty + 8 * i, kGroups);
    }
    sm90::barrier_init(query_arrived, 1);
    sm90::barrier_init_done();
  }
  __syncthreads();
  if (thread == 0) {
    sm90::prefetch_map(arguments.key_map);
    for (int unit = 0; unit < min(kUnits, kGroups * tiles); ++unit) load(unit);
  }
  wait_for_previous_kernel();  // it writes the query, but not the keys

  if (group < 0) {
    sm90::set_registers<Tile::kLaunchRegisters, Tile::kScoreRegisters>();
    if (thread == 0) load_wide_query<Queue, columns>(query, query_arrived, arguments, block_row);
    const InfoNceOperand<void>& prepared = arguments.operand;
    SoftmaxRows rows = start_rows(arguments, {prepared.positive[row], prepared.positive[row + 8]},
                                  {prepared.row_scale[row], prepared.row_scale[row + 8]});
    constexpr int kScores = Tile::kKeys / 8;
    float s[kScores][4];  // of the tile that is multiplied
    float p[kScores][4];  // of the tile before
    float rescale[2];
    const auto issue_scores = [&](int tile, int first_unit, int last_unit) {
#pragma unroll
      for (int i = first_unit; i < last_unit; ++i) {
        const int unit = tile * kGroups + i;
        wait_for(unit);
        const uint64_t queries = sm90::row_operand(query + i * Tile::kUnitPanels * Tile::kQueryPanelBytes);
        const uint64_t keys = sm90::row_operand(ring + unit % kUnits * Tile::kUnitBytes);
#pragma unroll
        for (int step = 0; step < Tile::kGroupColumns / 16; ++step) {  // 16 columns are 32 bytes of a panel's row
          sm90::multiply_rows(s, sm90::advance(queries, step / 4 * Tile::kQueryPanelBytes + step % 4 * 32),
                              sm90::advance(keys, step / 4 * Tile::kKeyPanelBytes + step % 4 * 32), i > 0 || step > 0,
                              type);
        }
      }
      sm90::products_commit();
    };
    const auto begin = [&] {
      sm90::pin(s);
      sm90::products_begin();
    };
    sm90::barrier_wait(query_arrived, 0);  // even without a tile: a block must not exit before its copies complete
    if (tiles > 0) {
      begin();
      issue_scores(0, 0, kGroups);
    }
    for (int tile = 0; tile < tiles; ++tile) {
      sm90::products_wait();
      sm90::pin(s);
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[j][i] = s[j][i];
      }
      sm90::pin(p);
      if (tile + 1 < tiles) {
        begin();
        issue_scores(tile + 1, 0, Tile::kAhead);
      }
      if (tile + 1 == tiles && last_keys < Tile::kKeys) drop_scores(p, last_keys, opaque(lane));
      softmax_of_tile<kBias>(p, rows, rescale);
      const int buffer = tile % 2;
      sm90::barrier_wait(weights_empty + 8 * buffer, sm90::empty_parity(tile, 2));
      if constexpr (kGradient) {
        const uint32_t writer = opaque(thread);  // so that the compiler holds no addresses during the loop
        const int to_row = static_cast<int>(writer / 32 * 16 + writer % 32 / 4);
        const int to_key = static_cast<int>(writer % 4 * 2) + buffer * Tile::kKeys;
        if (writer % 4 == 0) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sm90::store_shared_4(rescales + (buffer * kSm90GroupRows + to_row + 8 * r) * 4,
                                 __float_as_uint(rescale[r]));
          }
        }
#pragma unroll
        for (int j = 0; j < kScores; ++j) {
          const uint32_t to = weights + sm90::element_offset(to_row, to_key + 8 * j, Tile::kWeightBytes);
#pragma unroll
          for (int r = 0; r < 2; ++r) {  // rows 8 apart are swizzled alike
            sm90::store_shared_4(to + r * 1024, pack(p[j][2 * r], p[j][2 * r + 1], type));
          }
        }
        sm90::fence_shared();
      }
      sm90::barrier_arrive(weights_full + 8 * buffer);
      if (tile + 1 < tiles && Tile::kAhead < kGroups) {
        sm90::products_begin();
        issue_scores(tile + 1, Tile::kAhead, kGroups);
      }
    }
    join_lanes(rows);
    const uint32_t end_thread = opaque(thread);  // so that the compiler holds no addresses during the loop
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t end_row = block_row + end_thread / 32 * 16 + end_thread % 32 / 4 + 8 * r;
      if (end_row >= n || end_thread % 4 != 0) continue;
      write_row(arguments, rows, r, arguments.partials.slot(end_row, split), kUnbias);
    }
  } else {
    sm90::set_registers<Tile::kLaunchRegisters, Tile::kSumRegisters>();
    constexpr int kHalves = kGradient ? 2 : 1;
    constexpr int kOutputs = Tile::kHalf / 8;
    float o[kHalves][kOutputs][4] = {};
    const auto pin_all = [&] {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) sm90::pin(o[half]);
    };
    // Without products, nothing keeps a warp from missing phases of a barrier: only the thread that loads stays.
    const int group_tiles = kGradient || thread % 128 == 0 ? tiles : 0;
    for (int tile = 0; tile < group_tiles; ++tile) {
      const int unit = tile * kGroups + group;
      const int buffer = tile % 2;
      wait_for(unit);
      sm90::barrier_wait(weights_full + 8 * buffer, sm90::full_parity(tile, 2));
      if constexpr (kGradient) {
        const uint32_t keys = ring + unit % kUnits * Tile::kUnitBytes;
        // A weight of 0 does not remove a key that is not finite, and num_valid may end before such keys.
        if (tile + 1 == tiles && last_keys < Tile::kKeys) {
          constexpr int kRowStores = Tile::kGroupColumns / 4;
          for (int i = last_keys * kRowStores + thread % 128; i < Tile::kKeys * kRowStores; i += 128) {
            sm90::store_shared_8(keys + sm90::element_offset(i / kRowStores, i % kRowStores * 4, Tile::kKeyPanelBytes),
                                 0, 0);
          }
          sm90::fence_shared();
          sm90::warpgroup_barrier(1 + group);
        }
        const uint32_t from = rescales + (buffer * kSm90GroupRows + row_of_block) * 4;
        const float rescale[] = {sm90::load_shared_4(from), sm90::load_shared_4(from + 8 * 4)};
        if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
          for (int half = 0; half < kHalves; ++half) rescale_rows(o[half], rescale);
        }
        pin_all();
        sm90::products_begin();
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const uint64_t operand =
              sm90::column_operand(keys + half * (Tile::kHalf / 64) * Tile::kKeyPanelBytes, Tile::kKeyPanelBytes);
#pragma unroll
          for (int step = 0; step < Tile::kKeys / 16; ++step) {  // 16 keys are two groups of 8 rows
            const uint64_t p = sm90::advance(sm90::row_operand(weights), buffer * Tile::kKeys * 2 + step * 32);
            sm90::multiply_columns(o[half], p, sm90::advance(operand, step * 2048), 1, type);
          }
        }
        sm90::products_commit();
        sm90::products_wait();
        pin_all();
      }
      if (thread % 128 == 0) {
        sm90::barrier_arrive(weights_empty + 8 * buffer);
        if (unit + kUnits < tiles * kGroups) load(unit + kUnits);
      }
    }
    if constexpr (kGradient) {
      sm90::barrier_wait(query_arrived, 0);  // the last scores have been read, so the queries' memory is free
      constexpr int kScratchBytes = 8 * Tile::kHalf * 4;
      static_assert(kGroups * 4 * kScratchBytes <= Tile::kQueryBytes);
      const uint32_t writer = opaque(thread);  // so that the compiler holds no addresses during the loop
      const int64_t warp_row = block_row + writer % 128 / 32 * 16;
      auto* const scratch = reinterpret_cast<float4*>(unaligned + (query - sm90::shared_address(unaligned)) +
                                                      (writer / 32 - 4) * kScratchBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first_column = (writer >= 256) * Tile::kGroupColumns + half * Tile::kHalf;
        write_sums<2>(o[half], kUnbias, scratch,
                      arguments.partials.keys + arguments.partials.slot(warp_row, split) * c + first_column,
                      arguments.partials.splits * c, n - warp_row, c - first_column, static_cast<int>(writer % 32));
      }
    }
  }
#endif
}

}  // namespace moco_ext::cuda
