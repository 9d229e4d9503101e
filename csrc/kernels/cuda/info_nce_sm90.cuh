// The InfoNCE pass over the queue for Hopper: the pass of info_nce_mma.cuh with warpgroup products.
//
// A block has a producer warpgroup, which fills a ring of key tiles, and two consumer warpgroups of 64 rows. Each reads
// a tile twice, as the operand of S = Q K^T (rows) and of O += P K (columns). Scores, P and O stay in registers. A
// softmax overlaps with products of its own warpgroup and of the other one (the order of FlashAttention-3):
//   issue S(j+1) -> issue O += P(j) K -> wait for S -> softmax of S(j+1) -> wait for O -> release tile j -> rescale O
// The warpgroups take turns to issue. Otherwise both would issue at once, and then need the other units at once, too.
// With up to 64 queries, both warpgroups have the same rows, and each its own split of the queue, without turns.
//
// 16-bit tiles are tensor copies. float32 elements become the sum of kTerms bfloat16 terms, each the rounded remainder
// of those before, in a plane of the tile each: three hold all 24 bits. The producer splits a tile once for the whole
// block, and a product of float32 operands is the sum of the products of their terms i, j with i + j < kTerms.
#pragma once

#include <type_traits>

#include "kernels/cuda/info_nce_sm90_launch.cuh"
#include "kernels/cuda/info_nce_softmax.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/sm90.cuh"

namespace moco_ext::cuda {

constexpr int kSm90GroupRows = 64;

template <typename Queue, int kTerms, int columns>
struct Sm90Tile {
  static constexpr bool kSplit = std::is_same_v<Queue, float>;
  using Operand = std::conditional_t<kSplit, __nv_bfloat16, Queue>;
  static constexpr int kKeys = sm90_tile_keys(kSplit, columns);
  static constexpr int kPanels = columns / 64;
  static constexpr int kKeyPanelBytes = kKeys * 128;
  static constexpr int kKeyPlaneBytes = kPanels * kKeyPanelBytes;
  static constexpr int kTileBytes = kTerms * kKeyPlaneBytes;
  static constexpr int kQueryPanelBytes = kSm90GroupRows * 128;
  static constexpr int kQueryPlaneBytes = kPanels * kQueryPanelBytes;
  // Per warpgroup. float32: registers hold the first term, because products of 64 keys with both operands in shared
  // memory are limited by its bandwidth. O goes through the same memory, so there is always a plane.
  static constexpr int kQueryBytes = (kTerms == 1 ? 1 : kTerms - kSplit) * kQueryPlaneBytes;
  // Tensor cores round sums towards zero, a bias that grows with the number of products. For float32 accuracy, they add
  // up P K of one tile and panel only, in registers that S of the next tile would need.
  static constexpr bool kExact = kTerms == 3;
  static constexpr int kWeightTerms = kExact ? 2 : 1;  // 16 bits are enough for P K: their errors average out
  static constexpr int kMaxSharedBytes = 227 * 1024;
  static constexpr int kOtherBytes = 1024 + 256;  // alignment, barriers
  static constexpr int kStagesThatFit = (kMaxSharedBytes - kOtherBytes - 2 * kQueryBytes) / kTileBytes;
  // Even, so that with two streams a stage always has tiles of the same one. Otherwise a consumer would skip phases of
  // the stage's barrier, and parity cannot tell it two phases early.
  static constexpr int kStages = kStagesThatFit < 8 ? kStagesThatFit / 2 * 2 : 8;
  static_assert(kStages >= (kExact ? 2 : 4) && (2 * kStages + 3) * 8 <= 256);
  static constexpr int kSharedBytes = kOtherBytes + 2 * kQueryBytes + kStages * kTileBytes;
  static constexpr int kThreads = 3 * 128;
};

struct Sm90Arguments {
  CUtensorMap query_map;  // 16-bit: boxes of [64 rows, 64 columns] of the query operand
  CUtensorMap key_map;    // 16-bit: boxes of [kKeys rows, 64 columns]
  const float* query;     // float32: [N_padded, C]
  const float* keys;      // float32: [K, C]
  const float* positive;
  const float* row_scale;
  InfoNcePartials partials;
  int64_t n;
  int c;
  int splits;
  int streams;  // 2: each warpgroup has its own split; 1: each has its own rows
  InfoNceKeyCount count;
  InfoNceMask mask;
  InfoNceTemperature temperature;
};

// Rows `row` and `row + 8`, which a lane has part of.
__device__ __forceinline__ SoftmaxRows start_rows(const Sm90Arguments& arguments, int64_t row) {
  SoftmaxRows rows{};
  const float log2_scale = 1.44269504f / arguments.temperature.value();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float row_scale = arguments.row_scale[row + 8 * r];
    rows.positive[r] = arguments.positive[row + 8 * r] / row_scale;
    rows.scale[r] = row_scale * log2_scale;
    rows.max[r] = -INFINITY;
  }
  return rows;
}

__device__ __forceinline__ void write_row(const Sm90Arguments& arguments, const SoftmaxRows& rows, int r, int64_t slot,
                                          float unbias) {
  arguments.partials.max[slot] = rows.max[r];
  arguments.partials.sum[slot] = rows.sum[r] * unbias;
  arguments.partials.rank[slot] = rows.rank[r];
}

// A warp's 16 rows of O, by way of `scratch` [8, 8 * tiles] in shared memory, so that it writes whole rows: directly,
// every store would touch 8 of them. `out` is the first row's first element; later rows are `row_stride` further.
template <int kInFlight, int tiles>
__device__ __forceinline__ void write_sums(const float (&o)[tiles][4], float unbias, float4* scratch, float* out,
                                           int64_t row_stride, int64_t rows, int columns, int lane) {
  constexpr int kUnits = 2 * tiles;  // of four columns, in a row
  // Where unit u of a row is: no two lanes of a half-warp's store share a bank.
  const auto at = [&](int row, int u) { return row * kUnits + (u ^ row % 4 * 2); };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float* to = out + 8 * r * row_stride + 4 * lane;
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
      reinterpret_cast<float2*>(scratch + at(lane / 4, 2 * i + lane % 4 / 2))[lane % 2] =
          make_float2(o[i][2 * r] * unbias, o[i][2 * r + 1] * unbias);
    }
    __syncwarp();
#pragma unroll kInFlight
    for (int row = 0; row < 8; ++row, to += row_stride) {
      if (row + 8 * r >= rows) break;
#pragma unroll
      for (int first = 0; first < kUnits; first += 32) {
        const int u = first + lane;
        if (u < kUnits && 4 * u < columns) *reinterpret_cast<float4*>(to + 4 * first) = scratch[at(row, u)];
      }
    }
    __syncwarp();
  }
}

// The pass for more than 256 columns of 16 bits (info_nce_sm90_wide.cuh).
template <typename Queue>
cudaError_t launch_info_nce_sm90_wide(const Sm90Arguments& arguments, dim3 grid, cudaStream_t stream);

// The next bfloat16 term of two floats, which it leaves with their remainders.
__device__ __forceinline__ uint32_t take_term(float& a, float& b) {
  const uint32_t term = pack(a, b, __nv_bfloat16{});
  a -= __uint_as_float(term << 16);
  b -= __uint_as_float(term & 0xffff0000u);
  return term;
}

// Writes the terms of four adjacent elements from term `first` on, in planes `plane_bytes` apart.
template <int first, int kTerms>
__device__ __forceinline__ void store_terms(float4 x, uint32_t shared, int plane_bytes) {
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    const uint32_t low = take_term(x.x, x.y);
    const uint32_t high = take_term(x.z, x.w);
    if (term >= first) sm90::store_shared_8(shared + (term - first) * plane_bytes, low, high);
  }
}

template <typename Queue, int kTerms, int columns, bool kGradient, bool kMasked>
__global__ void __launch_bounds__(Sm90Tile<Queue, kTerms, columns>::kThreads, 1)
    info_nce_sm90_kernel(const __grid_constant__ Sm90Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  let_next_kernel_start();
  using Tile = Sm90Tile<Queue, kTerms, columns>;
  // Units of four float32 that a producer thread holds. The fewer the products of a tile, the more must be in flight;
  // masks take the registers for it.
  constexpr int kMaxBatch = kTerms == 1 && !kMasked ? 16 : 8;
  constexpr int kProducerRegisters = !Tile::kSplit ? 24 : kMaxBatch == 16 ? 136 : 88;
  constexpr int kConsumerRegisters = (504 - kProducerRegisters) / 2;
  MOCO_DYNAMIC_SHARED(unaligned);
  const uint32_t query = (sm90::shared_address(unaligned) + 1023u) & ~1023u;
  const uint32_t ring = query + 2 * Tile::kQueryBytes;
  const uint32_t full = ring + Tile::kStages * Tile::kTileBytes;  // [kStages] barriers: the tile has arrived
  const uint32_t empty = full + Tile::kStages * 8;                // [kStages]: its consumers have read it
  const uint32_t query_arrived = empty + Tile::kStages * 8;
  const uint32_t turns = query_arrived + 8;  // [2]: the warps of the other warpgroup have issued
  const int thread = static_cast<int>(threadIdx.x);
  const int group = __shfl_sync(0xffffffffu, thread / 128, 0) - 1;  // tells the compiler that it is uniform
  const int streams = arguments.streams;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * (streams == 1 ? 2 * kSm90GroupRows : kSm90GroupRows);
  const int group_rows = streams == 1 ? kSm90GroupRows : 0;  // between the warpgroups' first rows
  const int c = arguments.c;

  // Tile t of stream s is in slot t * streams + s of the ring. Slots beyond a stream's last tile go around empty.
  const int64_t k = arguments.count.value();
  const int64_t all_tiles = (k + Tile::kKeys - 1) / Tile::kKeys;
  const int first_split = static_cast<int>(blockIdx.y) * streams;
  const auto first_tile_of_split = [&](int split) {
    return static_cast<int>(all_tiles * min(split, arguments.splits) / arguments.splits);
  };
  const auto tiles_of_split = [&](int split) { return first_tile_of_split(split + 1) - first_tile_of_split(split); };
  const auto longest_stream = [&] {
    return max(tiles_of_split(first_split), tiles_of_split(first_split + streams - 1));
  };

  if (thread == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      sm90::barrier_init(full + 8 * i, Tile::kSplit ? 128 : 1);
      sm90::barrier_init(empty + 8 * i, streams == 1 ? 2 : 1);
    }
    sm90::barrier_init(query_arrived, 1);
    for (int i = 0; i < 2; ++i) sm90::barrier_init(turns + 8 * i, 4);
    sm90::barrier_init_done();
  }
  __syncthreads();

  // Consumers wait for the previous kernel. It writes the query, but not the keys: see InfoNceMask::of_batch.
  if (thread < 128) {
    sm90::release_registers<kProducerRegisters>();
    const int bounds[] = {first_tile_of_split(first_split), first_tile_of_split(first_split + 1),
                          first_tile_of_split(first_split + 2)};
    const auto first_tile_of = [&](int stream) { return stream == 0 ? bounds[0] : bounds[1]; };
    const auto tiles_of = [&](int stream) { return stream == 0 ? bounds[1] - bounds[0] : bounds[2] - bounds[1]; };
    const int slots = longest_stream() * streams;
    const auto stage = [&](int slot) { return ring + slot % Tile::kStages * Tile::kTileBytes; };
    if constexpr (Tile::kSplit) {
      // In units of four elements. A thread loads a unit of the next batch as soon as it has split one of this batch.
      constexpr int kUnits = Tile::kKeys / 8 * Tile::kPanels;  // of a thread in a tile: every eighth row
      constexpr int kBatch = kUnits < kMaxBatch ? kUnits : kMaxBatch;
      constexpr int kBatches = kUnits / kBatch;
      constexpr int kBatchRows = Tile::kKeys / kBatches;
      const int thread_row = thread / 16;
      const int column = thread % 16 * 4;  // of every panel
      float4 raw[kBatch];
      const float* source = nullptr;            // the thread's first unit of the batch to load
      uint32_t next = 0;                        // offset of its next row
      int rows = 0;                             // from the first unit's on
      const auto start_batch = [&](int item) {  // batch item % kBatches of a slot
        const int stream = item / kBatches & (streams - 1);
        const int tile = item / kBatches >> (streams - 1);
        const int64_t key = static_cast<int64_t>(first_tile_of(stream) + tile) * Tile::kKeys +
                            item % kBatches * kBatchRows + thread_row;
        rows = tile < tiles_of(stream) ? static_cast<int>(min(k - key, int64_t{Tile::kKeys})) : 0;
        source = arguments.keys + key * c + column;
        next = 0;
      };
      const auto load = [&](int i) {  // zeros beyond the last key and column
        const bool valid = i / Tile::kPanels * 8 < rows && column + i % Tile::kPanels * 64 < c;
        raw[i] = valid ? __ldg(reinterpret_cast<const float4*>(source + next + i % Tile::kPanels * 64)) : float4{};
        if (i % Tile::kPanels == Tile::kPanels - 1) next += 8 * c;
        opaque(next);  // otherwise the compiler computes all addresses first, and lacks registers
      };
      start_batch(0);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) load(i);
      for (int item = 0; item < slots * kBatches; ++item) {
        const int slot = item / kBatches;
        const uint32_t shared = stage(slot) + item % kBatches * kBatchRows * 128 +
                                sm90::element_offset(thread_row, column, Tile::kKeyPanelBytes);
        if (item % kBatches == 0) {
          sm90::barrier_wait(empty + 8 * (slot % Tile::kStages), sm90::empty_parity(slot, Tile::kStages));
        }
        start_batch(item + 1);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {  // rows 8 apart are swizzled alike
          store_terms<0, kTerms>(raw[i],
                                 shared + i / Tile::kPanels * 8 * 128 + i % Tile::kPanels * Tile::kKeyPanelBytes,
                                 Tile::kKeyPlaneBytes);
          load(i);
        }
        if (item % kBatches == kBatches - 1) {
          sm90::fence_shared();
          sm90::barrier_arrive(full + 8 * (slot % Tile::kStages));
        }
      }
    } else if (thread == 0) {
      sm90::prefetch_map(arguments.query_map);
      sm90::prefetch_map(arguments.key_map);
      // Together, the first tiles of all blocks take long to arrive. Queries asked for after them would wait for them.
      constexpr int kAhead = 2;
      for (int slot = 0;; ++slot) {
        if (slot == min(slots, kAhead)) {
          wait_for_previous_kernel();
          sm90::barrier_expect(query_arrived, 2 * Tile::kQueryBytes);
          for (int i = 0; i < 2 * Tile::kPanels; ++i) {
            const int to_group = i / Tile::kPanels;
            sm90::copy_tensor(query + i * Tile::kQueryPanelBytes, arguments.query_map, i % Tile::kPanels * 64,
                              static_cast<int>(block_row) + to_group * group_rows, query_arrived);
          }
          sm90::barrier_wait(query_arrived, 0);
        }
        if (slot == slots) break;
        const int stream = slot & (streams - 1);
        const int tile = slot >> (streams - 1);
        const uint32_t arrived = full + 8 * (slot % Tile::kStages);
        sm90::barrier_wait(empty + 8 * (slot % Tile::kStages), sm90::empty_parity(slot, Tile::kStages));
        if (tile >= tiles_of(stream)) {
          sm90::barrier_arrive(arrived);
          continue;
        }
        sm90::barrier_expect(arrived, Tile::kTileBytes);
        for (int p = 0; p < Tile::kPanels; ++p) {
          sm90::copy_tensor(stage(slot) + p * Tile::kKeyPanelBytes, arguments.key_map, 64 * p,
                            (first_tile_of(stream) + tile) * Tile::kKeys, arrived);
        }
      }
    }
  } else {
    sm90::claim_registers<kConsumerRegisters>();
    wait_for_previous_kernel();
    const typename Tile::Operand type{};
    const int lane = thread % 32;
    const int64_t n = arguments.n;
    const int64_t group_row = block_row + group * group_rows;
    const int64_t row = group_row + thread % 128 / 32 * 16 + lane / 4;
    const int stream = streams == 1 ? 0 : group;
    const int split = first_split + stream;
    const int first_tile = first_tile_of_split(split);
    const int tiles = tiles_of_split(split);
    const int longest = streams == 1 ? tiles : longest_stream();
    const int split_keys = static_cast<int>(
        min(k - static_cast<int64_t>(first_tile) * Tile::kKeys, static_cast<int64_t>(tiles) * Tile::kKeys));
    const auto valid_keys = [&](int tile) { return min(split_keys - tile * Tile::kKeys, Tile::kKeys); };
    constexpr int kBias = std::is_same_v<Queue, __half> ? 12 : 0;  // keeps p >= 2^-26 above fp16's subnormals
    SoftmaxRows rows = start_rows(arguments, row);

    const uint32_t group_query = query + group * Tile::kQueryBytes;
    uint32_t query_words[Tile::kSplit ? columns / 16 : 1][4];
    if constexpr (Tile::kSplit) {
#pragma unroll
      for (int step = 0; step < columns / 16; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = step * 16 + i / 2 * 8 + lane % 4 * 2;
          float2 x{};
          if (column < c) x = *reinterpret_cast<const float2*>(arguments.query + (row + i % 2 * 8) * c + column);
          query_words[step][i] = pack(x.x, x.y, type);
        }
      }
      if constexpr (kTerms > 1) {
        for (int unit = thread % 128; unit < kSm90GroupRows * columns / 4; unit += 128) {
          const int of_group = unit / (columns / 4);
          const int column = unit % (columns / 4) * 4;
          float4 x{};
          if (column < c) {
            x = *reinterpret_cast<const float4*>(arguments.query + (group_row + of_group) * c + column);
          }
          store_terms<1, kTerms>(x, group_query + sm90::element_offset(of_group, column, Tile::kQueryPanelBytes),
                                 Tile::kQueryPlaneBytes);
        }
        sm90::fence_shared();
        sm90::warpgroup_barrier(1 + group);
      }
    } else {
      sm90::barrier_wait(query_arrived, 0);  // even without a tile: a block must not exit before its copies complete
    }

    constexpr int kScores = Tile::kKeys / 8;
    constexpr int kOutputs = kGradient ? columns / 8 : 1;
    constexpr int kWeightTerms = kGradient ? Tile::kWeightTerms : 0;
    float s[kScores][4] = {};
    float o[kOutputs][4] = {};
    using Weights = uint32_t[Tile::kWeightTerms][Tile::kKeys / 16][4];
    Weights p{};
    float rescale[2];
    const auto slot_of = [&](int tile) { return tile * streams + stream; };
    const auto tile_address = [&](int tile) { return ring + slot_of(tile) % Tile::kStages * Tile::kTileBytes; };
    const auto wait_for = [&](int tile) {
      const int slot = slot_of(tile);
      sm90::barrier_wait(full + 8 * (slot % Tile::kStages), sm90::full_parity(slot, Tile::kStages));
    };
    const auto release = [&](int tile) {
      if (thread % 128 == 0) sm90::barrier_arrive(empty + 8 * (slot_of(tile) % Tile::kStages));
    };
    // Products of small terms come first, so that less is rounded off them.
    const auto issue_scores = [&](int tile) {  // S = Q K^T
      const uint64_t query_operand = sm90::row_operand(group_query);
      const uint64_t key_operand = sm90::row_operand(tile_address(tile));
#pragma unroll
      for (int order = kTerms - 1; order >= 0; --order) {
#pragma unroll
        for (int term = 0; term <= order; ++term) {
#pragma unroll
          for (int step = 0; step < columns / 16; ++step) {  // 16 columns are 32 bytes of a panel's row
            const int keep = order < kTerms - 1 || term > 0 || step > 0;
            const uint64_t keys = sm90::advance(
                key_operand, (order - term) * Tile::kKeyPlaneBytes + step / 4 * Tile::kKeyPanelBytes + step % 4 * 32);
            if (Tile::kSplit && term == 0) {
              sm90::multiply_rows(s, query_words[Tile::kSplit ? step : 0], keys, keep, type);
            } else {
              const uint64_t queries =
                  sm90::advance(query_operand, (term - Tile::kSplit) * Tile::kQueryPlaneBytes +
                                                   step / 4 * Tile::kQueryPanelBytes + step % 4 * 32);
              sm90::multiply_rows(s, queries, keys, keep, type);
            }
          }
        }
      }
    };
    // sum = (keep ? sum : 0) + P K, of the columns from `panel` on.
    const auto issue_outputs = [&](auto& sum, const Weights& weights, int tile, int panel, int keep) {
      const uint64_t operand =
          sm90::column_operand(tile_address(tile) + panel * Tile::kKeyPanelBytes, Tile::kKeyPanelBytes);
#pragma unroll
      for (int order = kWeightTerms - 1; order >= 0; --order) {
#pragma unroll
        for (int term = 0; term <= order; ++term) {
#pragma unroll
          for (int j = 0; j < Tile::kKeys / 16; ++j) {  // 16 keys are two groups of 8 rows
            const bool first = order == kWeightTerms - 1 && term == 0 && j == 0;
            sm90::multiply_columns(sum, weights[term][j],
                                   sm90::advance(operand, (order - term) * Tile::kKeyPlaneBytes + j * 2048),
                                   first ? keep : 1, type);
          }
        }
      }
    };
    const auto mask = [&](int tile) {
      const int valid = valid_keys(tile);
      if (valid < Tile::kKeys) drop_scores(s, valid, lane);
      if constexpr (kMasked) {
        const int64_t first_key = static_cast<int64_t>(first_tile + tile) * Tile::kKeys;
        mask_scores<kScores>(s, rows, arguments.mask, row, n, first_key, valid, lane);
      }
    };
    const auto pack_weights = [&](Weights& weights) {
#pragma unroll
      for (int term = 0; term < kWeightTerms; ++term) {
#pragma unroll
        for (int j = 0; j < kScores; ++j) {  // two adjacent tiles of S already are an operand
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            uint32_t& word = weights[term][j / 2][j % 2 * 2 + r];
            if constexpr (Tile::kSplit) {
              word = take_term(s[j][2 * r], s[j][2 * r + 1]);
            } else {
              word = pack(s[j][2 * r], s[j][2 * r + 1], type);
            }
          }
        }
      }
    };
    // A weight of 0 does not remove a key that is not finite, and num_valid may end before such keys of the last tile.
    // Both warpgroups write the same zeros, and scores of these keys are dropped, so neither has to wait for the other.
    const auto clear_invalid_keys = [&](int tile) {
      const int valid = valid_keys(tile);
      if (Tile::kSplit || valid == Tile::kKeys) return;
      constexpr int kRowUnits = columns / 4;
      for (int unit = valid * kRowUnits + thread % 128; unit < Tile::kKeys * kRowUnits; unit += 128) {
        sm90::store_shared_8(
            tile_address(tile) + sm90::element_offset(unit / kRowUnits, unit % kRowUnits * 4, Tile::kKeyPanelBytes), 0,
            0);
      }
      sm90::fence_shared();
      sm90::warpgroup_barrier(1 + group);
    };
    // pin: while products run, the compiler may touch none of their registers. Otherwise it serializes them.
    const auto pin_weights = [&](Weights& weights) {
#pragma unroll
      for (int term = 0; term < kWeightTerms; ++term) sm90::pin(weights[term]);
    };
    const auto begin = [&](Weights& weights, auto&... operands) {
      (sm90::pin(operands), ...);
      pin_weights(weights);
      sm90::products_begin();
    };

    if constexpr (kGradient && !Tile::kExact) {
      // Where registers suffice, a softmax writes weights while a product reads those of the tile before. So P has two
      // buffers. A copy from one to the other would make ptxas wait after every product.
      constexpr bool kTwoBuffers = !kMasked && columns <= 128 && (!Tile::kSplit || kTerms == 2);
      const auto wait_for_outputs = [&](Weights& weights) {
        sm90::products_wait();
        sm90::pin(o);
        pin_weights(weights);
      };
      const auto step = [&](int tile, Weights& weights, Weights& next) {  // P K of a tile, softmax of the next
        wait_for(tile + 1);
        if (streams == 1) sm90::barrier_wait(turns + 8 * group, (tile + group + 1) & 1);
        begin(weights, s, o);
        issue_scores(tile + 1);
        sm90::products_commit();
        issue_outputs(o, weights, tile, 0, 1);
        sm90::products_commit();
        if (streams == 1) {  // every warp arrives, or the others could be two turns ahead of one that still waits
          __syncwarp();
          if (lane == 0) sm90::barrier_arrive(turns + 8 * (1 - group));
        }
        sm90::products_wait<1>();
        sm90::pin(s);
        mask(tile + 1);
        bool grew;
        if constexpr (kTwoBuffers) {
          grew = softmax_of_next_tile<kBias>(s, rows, rescale, next[0], type);
          pin_weights(next);
        } else {
          grew = softmax_of_tile<kBias>(s, rows, rescale);
        }
        // Without a branch here, the compiler would move the exponentials behind the wait for the outputs. Two
        // streams may lack the stages to hold this tile until the tile after next has arrived.
        if (streams == 1 && tile + 2 < tiles) wait_for(tile + 2);
        wait_for_outputs(weights);
        release(tile);
        if (grew) rescale_rows(o, rescale);
        if constexpr (!kTwoBuffers) pack_weights(next);
      };
      const auto end = [&](Weights& weights) {
        clear_invalid_keys(tiles - 1);
        begin(weights, o);
        issue_outputs(o, weights, tiles - 1, 0, 1);
        sm90::products_commit();
        wait_for_outputs(weights);
        release(tiles - 1);
      };
      if (tiles > 0) {
        wait_for(0);
        begin(p, s);
        issue_scores(0);
        sm90::products_commit();
        sm90::products_wait();
        sm90::pin(s);
        mask(0);
        softmax_of_tile<kBias>(s, rows, rescale);
        pack_weights(p);
        int tile = 0;
        if constexpr (kTwoBuffers) {
          Weights other{};
          while (tile + 1 < tiles) {
            step(tile++, p, other);
            if (tile + 1 == tiles) break;
            step(tile++, other, p);
          }
          if (tiles % 2 == 1) {
            end(p);
          } else {
            end(other);
          }
        } else {
          for (; tile + 1 < tiles; ++tile) step(tile, p, p);
          end(p);
        }
      }
    } else {
      for (int tile = 0; tile < tiles; ++tile) {
        wait_for(tile);
        begin(p, s);
        issue_scores(tile);
        sm90::products_commit();
        sm90::products_wait();
        sm90::pin(s);
        mask(tile);
        softmax_of_tile<kBias>(s, rows, rescale);
        if constexpr (kGradient) {
          pack_weights(p);
#pragma unroll
          for (int panel = 0; panel < Tile::kPanels; ++panel) {
            float sum[8][4];
            begin(p);
            issue_outputs(sum, p, tile, panel, 0);
            sm90::products_commit();
            sm90::products_wait();
            sm90::pin(sum);
            pin_weights(p);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
              for (int j = 0; j < 4; ++j) o[8 * panel + i][j] = fmaf(o[8 * panel + i][j], rescale[j / 2], sum[i][j]);
            }
          }
        }
        release(tile);
      }
    }

    for (int tile = tiles; tile < longest; ++tile) {
      wait_for(tile);
      release(tile);
    }

    constexpr float kUnbias = 1.0f / (1 << kBias);
    join_lanes(rows);
    if (split < arguments.splits) {
      // opaque: so that the compiler holds no addresses during the loop
      const int writer = opaque(thread);
      const int warp = writer % 128 / 32;
      const int64_t warp_row =
          static_cast<int64_t>(opaque(static_cast<int>(blockIdx.x))) * (2 * kSm90GroupRows / streams) +
          (streams == 1 ? writer / 32 - 4 : warp) * 16;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t this_row = warp_row + writer % 32 / 4 + 8 * r;
        if (this_row < n && writer % 4 == 0) {
          write_row(arguments, rows, r, arguments.partials.slot(this_row, split), kUnbias);
        }
      }
      if constexpr (kGradient) {
        sm90::warpgroup_barrier(1 + group);  // the queries' memory is free
        const int at = static_cast<int>(query - sm90::shared_address(unaligned)) +
                       (writer / 128 - 1) * Tile::kQueryBytes + warp * (Tile::kQueryPlaneBytes / 4);
        write_sums<4>(o, kUnbias, reinterpret_cast<float4*>(unaligned + at),
                      arguments.partials.keys + arguments.partials.slot(warp_row, split) * c,
                      arguments.partials.splits * c, n - warp_row, c, writer % 32);
      }
    }
  }
#endif
}

}  // namespace moco_ext::cuda
