// The key tiles of the Hopper pass (info_nce_sm90.cuh): their ring in shared memory, and the producer that fills it.
//
// 16-bit tiles are tensor copies. float32 elements become the sum of kTerms 16-bit terms (info_nce_terms.cuh), in a
// plane of the tile each. The producer splits a tile once for the whole block, in the memory of its floats.
#pragma once

#include <type_traits>

#include "kernels/cuda/info_nce_sm90_rows.cuh"
#include "kernels/cuda/info_nce_terms.cuh"

namespace moco_ext::cuda {

template <typename Queue_, typename Operand_, int terms, int columns>
struct Sm90Tile {
  using Queue = Queue_;
  using Operand = Operand_;
  static constexpr int kTerms = terms;
  static constexpr int kColumns = columns;
  static constexpr bool kSplit = std::is_same_v<Queue, float>;
  static constexpr bool kScaled = kSplit && std::is_same_v<Operand, __half>;
  static constexpr int kKeys = sm90_tile_keys(kSplit, columns);
  static constexpr int kPanels = columns / 64;
  static constexpr int kKeyPanelBytes = kKeys * 128;
  static constexpr int kKeyPlaneBytes = kPanels * kKeyPanelBytes;
  static constexpr int kTileBytes = kKeys * columns * sizeof(Queue);
  static constexpr int kQueryPanelBytes = kSm90GroupRows * 128;
  static constexpr int kQueryPlaneBytes = kPanels * kQueryPanelBytes;
  // Per warpgroup. float32: registers hold the first term, because products of 64 keys with both operands in shared
  // memory are limited by its bandwidth. O goes through the same memory, so there is always a plane.
  static constexpr int kQueryBytes = (kTerms == 1 ? 1 : kTerms - kSplit) * kQueryPlaneBytes;
  // Tensor cores round sums towards zero, a bias that grows with the number of products. For float32 accuracy, they add
  // up P K of one tile and panel only, in registers that S of the next tile would need.
  static constexpr bool kExact = kScaled && kTerms == 2;
  static constexpr int kWeightTerms = kExact ? 2 : 1;  // one is enough for P K otherwise: their errors average out
  static constexpr float kScale = kScaled ? kUnitRowScale : 1.0f;  // of queries and keys
  static constexpr int kMaxSharedBytes = 227 * 1024;
  static constexpr int kOtherBytes = 1024 + 256;  // alignment, barriers
  static constexpr int kStagesThatFit = (kMaxSharedBytes - kOtherBytes - 2 * kQueryBytes) / kTileBytes;
  // Even, so that with two streams a stage always has tiles of the same one. Otherwise a consumer would skip phases of
  // the stage's barrier, and parity cannot tell it two phases early.
  static constexpr int kStages = kStagesThatFit < 8 ? kStagesThatFit / 2 * 2 : 8;
  static constexpr int kRingBarrierBytes = 28 * kStages + 8;  // with scales
  static_assert(kStages >= 4 && kRingBarrierBytes + 3 * 8 <= 256);
  static_assert(kTerms * kKeyPlaneBytes <= kTileBytes);
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
  uint32_t barriers;

  __device__ __forceinline__ uint32_t tile(int slot) const { return tiles + slot % Tile::kStages * Tile::kTileBytes; }
  // Barriers: the tile is there; its consumers have read it; the floats are there, of which the tile will be made; they
  // are there a second time.
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 8 * (slot % Tile::kStages); }
  __device__ __forceinline__ uint32_t empty(int slot) const { return full(slot) + 8 * Tile::kStages; }
  __device__ __forceinline__ uint32_t floats(int slot) const { return full(slot) + 16 * Tile::kStages; }
  __device__ __forceinline__ uint32_t floats_again() const { return barriers + 24 * Tile::kStages; }
  // A float: what scores and sums of the tile are multiplied by, if it is scaled.
  __device__ __forceinline__ uint32_t scale(int slot) const { return floats_again() + 8 + 4 * (slot % Tile::kStages); }

  __device__ __forceinline__ void init(int consumers) const {
    for (int i = 0; i < Tile::kStages; ++i) {
      sm90::barrier_init(full(i), Tile::kSplit ? 128 : 1);
      sm90::barrier_init(empty(i), consumers);
      if (Tile::kSplit) sm90::barrier_init(floats(i), 1);
    }
    if (Tile::kScaled) sm90::barrier_init(floats_again(), 1);
  }
  __device__ __forceinline__ void wait_until_full(int slot) const {
    sm90::barrier_wait(full(slot), sm90::full_parity(slot, Tile::kStages));
  }
  __device__ __forceinline__ void wait_until_empty(int slot) const {
    sm90::barrier_wait(empty(slot), sm90::empty_parity(slot, Tile::kStages));
  }
  __device__ __forceinline__ void wait_for_floats(int slot) const {
    sm90::barrier_wait(floats(slot), sm90::full_parity(slot, Tile::kStages));
  }
  __device__ __forceinline__ void release(int slot) const { sm90::barrier_arrive(empty(slot)); }
};

// Writes the terms of four adjacent elements from term `first` on, in planes `plane_bytes` apart.
template <int first, int terms, typename Operand>
__device__ __forceinline__ void store_terms(float4 x, uint32_t shared, int plane_bytes, Operand type) {
#pragma unroll
  for (int term = 0; term < terms; ++term) {
    const uint32_t low = take_term(x.x, x.y, type);
    const uint32_t high = take_term(x.z, x.w, type);
    if (term >= first) sm90::store_shared_8(shared + (term - first) * plane_bytes, low, high);
  }
}

constexpr int kProducerBarrier = 3;  // the other warpgroups have 1 and 2

// Writes the terms of a tile in the place of its floats; of rows from `valid` on, zeros. The floats of eight rows are
// where their terms will be, so a warp may overwrite them when it has read them.
template <typename Tile>
__device__ __forceinline__ void split_tile(uint32_t tile, int valid, TermScale& scale) {
  constexpr int kUnits = 4 * Tile::kPanels;                  // of four elements, that a lane has of eight rows
  const int thread = opaque(static_cast<int>(threadIdx.x));  // so that the compiler holds no addresses during the loop
  const int row = thread / 32 * 8 + thread / 16 % 2;         // the first; others are an even number of rows further
  const uint32_t chunk = thread % 8 ^ row % 8;
  const uint32_t from = tile + thread / 8 % 2 * Tile::kKeyPanelBytes + row * 128;
  const uint32_t to = tile + row * 128 + thread % 2 * 8;
  if (valid < Tile::kKeys) {
    constexpr int kRowChunks = Tile::kColumns / 4;
    for (int i = valid * kRowChunks + thread; i < Tile::kKeys * kRowChunks; i += 128) {
      const uint32_t floats = tile + i % kRowChunks / 8 * Tile::kKeyPanelBytes + i / kRowChunks * 128 + i % 8 * 16;
      sm90::store_shared_8(floats, 0, 0);
      sm90::store_shared_8(floats + 8, 0, 0);
    }
    sm90::warpgroup_barrier(kProducerBarrier);
  }
#pragma unroll 1
  for (int first = 0; first < Tile::kKeys; first += 32) {
    float4 x[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int further = i / Tile::kPanels * 2;
      x[i] = sm90::load_shared_16(from + (first + further) * 128 + i % Tile::kPanels * 2 * Tile::kKeyPanelBytes +
                                  (chunk ^ further) * 16);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int further = i / Tile::kPanels * 2;
      if constexpr (Tile::kScaled) scale.apply(x[i]);
      store_terms<0, Tile::kTerms>(x[i],
                                   to + (first + further) * 128 + i % Tile::kPanels * Tile::kKeyPanelBytes +
                                       ((thread % 16 / 2 ^ row % 8) ^ further) * 16,
                                   Tile::kKeyPlaneBytes, typename Tile::Operand{});
    }
  }
}

// Starts the copies of a tile, which complete on the barrier `arrived`.
template <typename Tile>
__device__ __forceinline__ void request_tile(const Sm90Ring<Tile>& ring, const Sm90Arguments& arguments,
                                             const Sm90Streams& streams, int slot, uint32_t arrived) {
  const int stream = streams.stream_of(slot);
  const int tile = streams.tile_of(slot);
  if (tile >= streams.tiles(stream)) return sm90::barrier_arrive(arrived);
  sm90::barrier_expect(arrived, Tile::kTileBytes);
  for (int box = 0; box < Tile::kTileBytes / Tile::kKeyPanelBytes; ++box) {
    sm90::copy_tensor(ring.tile(slot) + box * Tile::kKeyPanelBytes, arguments.key_map,
                      box * static_cast<int>(128 / sizeof(typename Tile::Queue)),
                      (streams.first(stream) + tile) * Tile::kKeys, arrived);
  }
}

// Together, the first tiles of all blocks take long to arrive, and the queries would wait behind them. So only these
// are requested before the queries have arrived.
constexpr int kFirstTiles = 2;

// The producer of 16-bit keys: one thread starts the copies.
template <typename Tile>
__device__ __forceinline__ void copy_keys(const Sm90Ring<Tile>& ring, const Sm90Arguments& arguments,
                                          const Sm90Streams& streams, uint32_t query_arrived) {
  sm90::prefetch_map(arguments.key_map);
  for (int slot = 0; slot < streams.slots; ++slot) {
    if (slot == kFirstTiles) sm90::barrier_wait(query_arrived, 0);
    ring.wait_until_empty(slot);
    request_tile(ring, arguments, streams, slot, ring.full(slot));
  }
}

// The producer of float32 keys: one thread starts the copies, and 128 split the tiles.
template <typename Tile>
__device__ __forceinline__ void split_keys(const Sm90Ring<Tile>& ring, const Sm90Arguments& arguments,
                                           const Sm90Streams& streams, int64_t k, uint32_t query_arrived, int thread) {
  int requested = 0;
  const auto request_until = [&](int end) {  // by one warp
    for (; requested < min(end, streams.slots); ++requested) {
      ring.wait_until_empty(requested);
      if (thread == 0) request_tile(ring, arguments, streams, requested, ring.floats(requested));
    }
  };
  if (thread == 0) sm90::prefetch_map(arguments.key_map);
  if (thread < 32) request_until(kFirstTiles);
  TermScale scale;
  const auto any = [](bool x) { return sm90::any_of_warpgroup(kProducerBarrier, x); };
  int retries = 0;
  for (int slot = 0; slot < streams.slots; ++slot) {
    const int stream = streams.stream_of(slot);
    const int tile = streams.tile_of(slot);
    ring.wait_for_floats(slot);
    if (tile < streams.tiles(stream)) {
      const int64_t first_key = static_cast<int64_t>(streams.first(stream) + tile) * Tile::kKeys;
      const int valid = static_cast<int>(min(k - first_key, int64_t{Tile::kKeys}));
      for (;; ++retries) {
        split_tile<Tile>(ring.tile(slot), valid, scale);
        sm90::fence_shared();
        if (!Tile::kScaled || scale.fits(any)) break;
        if (thread == 0) request_tile(ring, arguments, streams, slot, ring.floats_again());
        sm90::barrier_wait(ring.floats_again(), retries & 1);
      }
      if (Tile::kScaled && thread == 0) {
        sm90::store_shared_4(ring.scale(slot), __float_as_uint(scale.to_unit_rows()));
      }
    }
    sm90::barrier_arrive(ring.full(slot));
    if (thread < 32) {
      if (slot == 0) sm90::barrier_wait(query_arrived, 0);
      request_until(slot + Tile::kStages - 1);  // consumers keep a tile until the next two are there
    }
  }
}

}  // namespace moco_ext::cuda
