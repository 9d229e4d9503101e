// The InfoNCE pass over the queue for Hopper: the pass of info_nce_mma.cuh with warpgroup products.
//
// A block has a producer warpgroup, which fills a ring of key tiles, and two consumer warpgroups of 64 rows. Each reads
// a tile twice, as the operand of S = Q K^T (rows) and of O += P K (columns). Scores, P and O stay in registers. A
// softmax overlaps with products of its own warpgroup and of the other one (the order of FlashAttention-3):
//   issue S(j+1) -> issue O += P(j) K -> wait for S -> softmax of S(j+1) -> wait for O -> release tile j -> rescale O
// The warpgroups take turns to issue. Otherwise both would issue at once, and then need the other units at once, too.
// With up to 64 queries, both warpgroups have the same rows, and each its own split of the queue, without turns.
//
// A product of float32 operands is the sum of the products of their 16-bit terms i, j with i + j < kTerms.
#pragma once

#include "kernels/cuda/info_nce_sm90_queries.cuh"

namespace moco_ext::cuda {

template <typename Tile, bool kGradient, bool kMasked>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    info_nce_sm90_kernel(const __grid_constant__ Sm90Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  let_next_kernel_start();
  constexpr int kTerms = Tile::kTerms;
  constexpr int columns = Tile::kColumns;
  constexpr int kProducerRegisters = Tile::kSplit ? 88 : 24;
  constexpr int kConsumerRegisters = (504 - kProducerRegisters) / 2;
  MOCO_DYNAMIC_SHARED(unaligned);
  const uint32_t query = (sm90::shared_address(unaligned) + 1023u) & ~1023u;
  const uint32_t first_tile_address = query + 2 * Tile::kQueryBytes;
  const uint32_t barriers = first_tile_address + Tile::kStages * Tile::kTileBytes;
  const Sm90Ring<Tile> ring{first_tile_address, barriers};
  const uint32_t query_arrived = barriers + Tile::kRingBarrierBytes;
  const uint32_t turns = query_arrived + 8;  // [2]: the warps of the other warpgroup have issued
  const int thread = static_cast<int>(threadIdx.x);
  const int group = __shfl_sync(0xffffffffu, thread / 128, 0) - 1;  // tells the compiler that it is uniform
  const int streams = arguments.streams;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * (streams == 1 ? 2 * kSm90GroupRows : kSm90GroupRows);
  const int group_rows = streams == 1 ? kSm90GroupRows : 0;  // between the warpgroups' first rows
  const int c = arguments.c;

  const int64_t k = arguments.count.value();
  const auto tiles_of_block = [&] {
    return Sm90Tiles(static_cast<int>((k + Tile::kKeys - 1) / Tile::kKeys), arguments.splits,
                     static_cast<int>(blockIdx.y) * streams, streams);
  };

  if (thread == 0) {
    ring.init(streams == 1 ? 2 : 1);
    sm90::barrier_init(query_arrived, 8);
    for (int i = 0; i < 2; ++i) sm90::barrier_init(turns + 8 * i, 4);
    sm90::barrier_init_done();
  }
  __syncthreads();

  if (thread < 128) {
    sm90::release_registers<kProducerRegisters>();
    const Sm90Streams producer_streams(tiles_of_block());  // computed by all threads, in uniform registers
    if constexpr (Tile::kSplit) {
      split_keys(ring, arguments, producer_streams, k, query_arrived, thread);
    } else if (thread == 0) {
      copy_keys(ring, arguments, producer_streams, query_arrived);
    }
  } else {
    sm90::claim_registers<kConsumerRegisters>();
    const typename Tile::Operand type{};
    const int lane = thread % 32;
    const int64_t n = arguments.n;
    const int64_t group_row = block_row + group * group_rows;
    const int64_t row = group_row + thread % 128 / 32 * 16 + lane / 4;
    constexpr int kBias = kWeightBias<typename Tile::Operand>;
    const bool writes = blockIdx.y == 0 && (streams == 1 || group == 0);  // of the first split
    const uint32_t group_query = query + group * Tile::kQueryBytes;
    uint32_t query_words[Tile::kSplit ? columns / 16 : 1][4];
    SoftmaxRows rows = prepare_rows<Tile, kMasked>(arguments, row - lane / 4, writes, group_query,
                                                   thread % 128 / 32 * 16, query_arrived, query_words);
    if constexpr (!Tile::kSplit || kTerms > 1) sm90::warpgroup_barrier(1 + group);

    const int stream = streams == 1 ? 0 : group;
    const Sm90Tiles block = tiles_of_block();
    const int split = block.first_split + stream;
    const int first_tile = block.first(split);
    const int tiles = block.count(split);
    const int longest = streams == 1 ? tiles : block.longest();
    const int split_keys = static_cast<int>(
        min(k - static_cast<int64_t>(first_tile) * Tile::kKeys, static_cast<int64_t>(tiles) * Tile::kKeys));
    const auto valid_keys = [&](int tile) { return min(split_keys - tile * Tile::kKeys, Tile::kKeys); };

    constexpr int kScores = Tile::kKeys / 8;
    constexpr int kOutputs = kGradient ? columns / 8 : 1;
    constexpr int kWeightTerms = kGradient ? Tile::kWeightTerms : 0;
    float s[kScores][4] = {};
    float o[kOutputs][4] = {};
    using Weights = uint32_t[Tile::kWeightTerms][Tile::kKeys / 16][4];
    Weights p{};
    float rescale[2];
    const auto slot_of = [&](int tile) { return tile * streams + stream; };
    const auto tile_address = [&](int tile) { return ring.tile(slot_of(tile)); };
    const auto wait_for = [&](int tile) { ring.wait_until_full(slot_of(tile)); };
    const auto scale_of = [&](int tile) {  // of scores and sums
      return Tile::kScaled ? sm90::load_shared_4(ring.scale(slot_of(tile))) : 1.0f;
    };
    const auto release = [&](int tile) {
      if (thread % 128 == 0) ring.release(slot_of(tile));
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
              word = take_term(s[j][2 * r], s[j][2 * r + 1], type);
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
      constexpr bool kTwoBuffers = !kMasked && columns <= 128;
      float scale_of_sums = 1.0f;
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
        const float scale = scale_of(tile + 1);
        sm90::products_wait<1>();
        sm90::pin(s);
        rescale_tile(s, scale);
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
        if (Tile::kScaled && scale != scale_of_sums) {
          rescale_tile(o, scale_of_sums / scale);
          scale_of_sums = scale;
        }
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
        scale_of_sums = scale_of(0);
        sm90::products_wait();
        sm90::pin(s);
        rescale_tile(s, scale_of_sums);
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
        rescale_tile(o, scale_of_sums);
      }
    } else {
      for (int tile = 0; tile < tiles; ++tile) {
        wait_for(tile);
        const float scale = scale_of(tile);
        begin(p, s);
        issue_scores(tile);
        sm90::products_commit();
        sm90::products_wait();
        sm90::pin(s);
        rescale_tile(s, scale);
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
            rescale_tile(sum, scale);
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

    // Without products, nothing keeps a warp from missing phases of a barrier: only the thread that releases stays.
    for (int tile = tiles; thread % 128 == 0 && tile < longest; ++tile) {
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
        rows.max[r] /= Tile::kScale;  // of the keys: row_scale only has that of the queries
        const int64_t this_row = warp_row + writer % 32 / 4 + 8 * r;
        if (this_row < n && writer % 4 == 0) {
          write_row(arguments, rows, r, arguments.partials.slot(this_row, split), kUnbias);
        }
      }
      if constexpr (kGradient) {
        sm90::warpgroup_barrier(writer / 128);  // the queries' memory is free
        const int at = static_cast<int>(query - sm90::shared_address(unaligned)) +
                       (writer / 128 - 1) * Tile::kQueryBytes + warp * (Tile::kQueryPlaneBytes / 4);
        write_sums<4>(o, kUnbias / Tile::kScale, reinterpret_cast<float4*>(unaligned + at),
                      arguments.partials.keys + arguments.partials.slot(warp_row, split) * c,
                      arguments.partials.splits * c, n - warp_row, c, writer % 32);
      }
    }
  }
#endif
}

}  // namespace moco_ext::cuda
