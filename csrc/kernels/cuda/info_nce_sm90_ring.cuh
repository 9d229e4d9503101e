// The key tiles of the Hopper pass (info_nce_sm90.cuh): their ring in shared memory, and the producer that fills it.
//
// 16-bit tiles are tensor copies. float32 elements become the sum of kTerms bfloat16 terms, each the rounded remainder
// of those before, in a plane of the tile each: three hold all 24 bits. The producer splits a tile once for the whole
// block.
#pragma once

#include <type_traits>

#include "kernels/cuda/info_nce_sm90_rows.cuh"

namespace moco_ext::cuda {

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

// The tiles of a block: those of one split of the queue, or of two. Tile t of stream s is in slot t * streams + s of
// the ring. Slots beyond a stream's last tile go around empty.
struct Sm90Tiles {
  int splits;
  int first_split;
  int streams;
  int each;  // of a split, and one more of the first `rest` splits
  int rest;

  __device__ __forceinline__ Sm90Tiles(int all, int splits, int first_split, int streams)
      : splits(splits), first_split(first_split), streams(streams), each(all / splits), rest(all - each * splits) {}
  __device__ __forceinline__ int first(int split) const {
    const int before = min(split, splits);
    return before * each + min(before, rest);
  }
  __device__ __forceinline__ int count(int split) const { return first(split + 1) - first(split); }
  __device__ __forceinline__ int longest() const { return max(count(first_split), count(first_split + streams - 1)); }
};

// For the producer, which asks for them at every tile: where its streams' tiles begin and end.
struct Sm90Streams {
  int bounds[3];  // stream s has the tiles bounds[s] to bounds[s + 1]
  int count;
  int slots;

  __device__ __forceinline__ explicit Sm90Streams(const Sm90Tiles& block)
      : bounds{block.first(block.first_split), block.first(block.first_split + 1), block.first(block.first_split + 2)},
        count(block.streams),
        slots(block.longest() * block.streams) {}
  __device__ __forceinline__ int stream_of(int slot) const { return slot & (count - 1); }
  __device__ __forceinline__ int tile_of(int slot) const { return slot >> (count - 1); }
  __device__ __forceinline__ int first(int stream) const { return stream == 0 ? bounds[0] : bounds[1]; }
  __device__ __forceinline__ int tiles(int stream) const {
    return stream == 0 ? bounds[1] - bounds[0] : bounds[2] - bounds[1];
  }
};

template <typename Tile>
struct Sm90Ring {
  uint32_t tiles;
  uint32_t full;   // [kStages] barriers: the tile has arrived
  uint32_t empty;  // [kStages]: its consumers have read it

  __device__ __forceinline__ uint32_t tile(int slot) const { return tiles + slot % Tile::kStages * Tile::kTileBytes; }
  __device__ __forceinline__ uint32_t arrived(int slot) const { return full + 8 * (slot % Tile::kStages); }
  __device__ __forceinline__ void wait_until_full(int slot) const {
    sm90::barrier_wait(arrived(slot), sm90::full_parity(slot, Tile::kStages));
  }
  __device__ __forceinline__ void wait_until_empty(int slot) const {
    sm90::barrier_wait(empty + 8 * (slot % Tile::kStages), sm90::empty_parity(slot, Tile::kStages));
  }
  __device__ __forceinline__ void release(int slot) const { sm90::barrier_arrive(empty + 8 * (slot % Tile::kStages)); }
};

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

// The producer of float32 keys: 128 threads load, split and store them.
template <typename Tile, int kTerms, int kMaxBatch>
__device__ __forceinline__ void split_keys(const Sm90Ring<Tile>& ring, const Sm90Arguments& arguments,
                                           const Sm90Streams& streams, int64_t k, int thread) {
  // In units of four elements. A thread loads a unit of the next batch as soon as it has split one of this batch.
  constexpr int kUnits = Tile::kKeys / 8 * Tile::kPanels;  // of a thread in a tile: every eighth row
  constexpr int kBatch = kUnits < kMaxBatch ? kUnits : kMaxBatch;
  constexpr int kBatches = kUnits / kBatch;
  constexpr int kBatchRows = Tile::kKeys / kBatches;
  const int c = arguments.c;
  const int thread_row = thread / 16;
  const int column = thread % 16 * 4;  // of every panel
  float4 raw[kBatch];
  const float* source = nullptr;            // the thread's first unit of the batch to load
  uint32_t next = 0;                        // offset of its next row
  int rows = 0;                             // from the first unit's on
  const auto start_batch = [&](int item) {  // batch item % kBatches of a slot
    const int stream = streams.stream_of(item / kBatches);
    const int tile = streams.tile_of(item / kBatches);
    const int64_t key =
        static_cast<int64_t>(streams.first(stream) + tile) * Tile::kKeys + item % kBatches * kBatchRows + thread_row;
    rows = tile < streams.tiles(stream) ? static_cast<int>(min(k - key, int64_t{Tile::kKeys})) : 0;
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
  for (int item = 0; item < streams.slots * kBatches; ++item) {
    const int slot = item / kBatches;
    const int writer = opaque(thread);  // so that the compiler holds no addresses during the loop
    const uint32_t shared = ring.tile(slot) + item % kBatches * kBatchRows * 128 +
                            sm90::element_offset(writer / 16, writer % 16 * 4, Tile::kKeyPanelBytes);
    if (item % kBatches == 0) ring.wait_until_empty(slot);
    start_batch(item + 1);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {  // rows 8 apart are swizzled alike
      store_terms<0, kTerms>(raw[i], shared + i / Tile::kPanels * 8 * 128 + i % Tile::kPanels * Tile::kKeyPanelBytes,
                             Tile::kKeyPlaneBytes);
      load(i);
    }
    if (item % kBatches == kBatches - 1) {
      sm90::fence_shared();
      sm90::barrier_arrive(ring.arrived(slot));
    }
  }
}

// The producer of 16-bit keys: one thread starts the tensor copies.
template <typename Tile>
__device__ __forceinline__ void copy_keys(const Sm90Ring<Tile>& ring, const Sm90Arguments& arguments,
                                          const Sm90Streams& streams, uint32_t query_arrived) {
  sm90::prefetch_map(arguments.key_map);
  // Together, the first tiles of all blocks take long to arrive, and the queries would wait behind them.
  constexpr int kAhead = 2;
  for (int slot = 0; slot < streams.slots; ++slot) {
    if (slot == kAhead) sm90::barrier_wait(query_arrived, 0);
    const int stream = streams.stream_of(slot);
    const int tile = streams.tile_of(slot);
    ring.wait_until_empty(slot);
    if (tile >= streams.tiles(stream)) {
      sm90::barrier_arrive(ring.arrived(slot));
      continue;
    }
    sm90::barrier_expect(ring.arrived(slot), Tile::kTileBytes);
    for (int p = 0; p < Tile::kPanels; ++p) {
      sm90::copy_tensor(ring.tile(slot) + p * Tile::kKeyPanelBytes, arguments.key_map, 64 * p,
                        (streams.first(stream) + tile) * Tile::kKeys, ring.arrived(slot));
    }
  }
}

}  // namespace moco_ext::cuda
