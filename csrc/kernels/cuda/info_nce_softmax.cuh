// The softmax of a tile of scores in the registers of a tensor-core product. A lane holds rows lane / 4 and lane / 4 +
// 8 of 16, and two of every 8 keys, from lane % 4 * 2 on (D in mma.cuh, and a warp's part of a warpgroup's product).
#pragma once

#include <type_traits>

#include "kernels/cuda/info_nce_workspace.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/reduce.cuh"

namespace moco_ext::cuda {

// The running state of a lane's two rows: 0 is lane / 4, 1 is lane / 4 + 8.
struct SoftmaxRows {
  float positive[2];
  float scale[2];    // from a score to the exponent of 2
  float max[2];      // of the scores, over the row's four lanes, about: weights may be up to 2^20
  float offset[2];   // of the exponents: a score's is score * scale + offset
  float sum[2];      // over this lane's keys
  uint32_t rank[2];  // over this lane's keys
  // For softmax_of_next_tile, of the whole warp:
  bool steady;     // the next tile may do without a new maximum
  bool counts;     // scores above a positive are to be expected
  float least[2];  // a lane with a score above the positive has weights of at least this
};

// Weights in float16 are multiplied by 2^kWeightBias. It has 2^-14 to 2^15: weights from 2^-23 on keep all bits, and up
// to 2^6 there is no need for a new maximum. With 12 for 9, most tiles of random keys needed one.
template <typename Operand>
constexpr int kWeightBias = std::is_same_v<Operand, __half> ? 9 : 0;

// Up to this maximum in units of log 2, the rounding error of max * scale changes a weight by less than 2^-17.
constexpr float kLargestProduct = 256.0f;

// Counts scores greater than `positive` at two instructions a score. A comparison and a conditional increment would be
// three, on units of half the rate, but need fewer registers. big * (s - positive), exact in an fma but for the last
// rounding, is at least 1 if the scores differ by more than the smallest normal number.
struct AboveCounter {
  static constexpr float kUnit = 0x1p23f;  // from here on, a float's last bit is 1
  float big;
  float offset;
  float count = kUnit;
  __device__ __forceinline__ explicit AboveCounter(float positive) {
    // A power of two, so that positive * big is about 2^100, or less if big would overflow: 354 = 100 + 2 * 127.
    const uint32_t exponent = __float_as_uint(positive) & 0x7f800000u;
    big = __uint_as_float(min((354u << 23) - exponent, 253u << 23));
    offset = -positive * big;
  }
  __device__ __forceinline__ void operator()(float s) { count += saturated_fma(s, big, offset); }
  __device__ __forceinline__ uint32_t value() const { return __float_as_uint(count) - __float_as_uint(kUnit); }
};

// How many of the lane's scores of row r are greater than `positive`.
template <int tiles>
__device__ __forceinline__ uint32_t count_above(const float (&s)[tiles][4], int r, float positive) {
  if constexpr (tiles <= 4) {
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < 2 * tiles; ++i) count += s[i / 2][2 * r + i % 2] > positive;
    return count;
  } else {
    AboveCounter even(positive);
    AboveCounter odd(positive);
#pragma unroll
    for (int i = 0; i < tiles; ++i) even(s[i][2 * r]), odd(s[i][2 * r + 1]);
    return even.value() + odd.value();
  }
}

// Replaces scores by 2^bias times their weights relative to the running maximum. Returns whether the maximum of a row
// of the warp grew; then sums of the rows' earlier weights must be multiplied by `rescale`. It only grows by more than
// kSlack, which is rare after a row's first tile: until then weights above 1 do no harm.
template <int kBias, int tiles>
__device__ __forceinline__ bool softmax_of_tile(float (&s)[tiles][4], SoftmaxRows& rows, float (&rescale)[2]) {
  constexpr float kSlack = kBias > 0 ? 15.0f - kBias : 8.0f;
  float shift[2];
  float offset[2];
  bool grew = false;
  bool above = false;
  bool large = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float max = -INFINITY;
#pragma unroll
    for (int j = 0; j < tiles; ++j) max = fmaxf(max, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
    above |= max > rows.positive[r];
    // Not if they are equal or one is NaN.
    const bool grows = (max - rows.max[r]) * rows.scale[r] > kSlack;
    if (!grows) max = rows.max[r];
    shift[r] = max == -INFINITY ? 0.0f : max;  // -inf - -inf would be NaN
    rescale[r] = exp2_approx((rows.max[r] - shift[r]) * rows.scale[r]);
    offset[r] = -shift[r] * rows.scale[r];
    large |= !(fabsf(offset[r]) <= kLargestProduct);
    offset[r] += kBias;
    rows.offset[r] = offset[r];
    grew |= grows;
    rows.max[r] = max;
    rows.sum[r] *= rescale[r];
  }
  if (__any_sync(0xffffffffu, above || large)) {  // rarer as positives score above most negatives
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.rank[r] += count_above<tiles>(s, r, rows.positive[r]);
    // Logits may have any size, and the rounding error of max * scale alone could overflow exp2: subtract first.
    if (__any_sync(0xffffffffu, large)) {
#pragma unroll
      for (int j = 0; j < tiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] -= shift[i / 2];
      }
      offset[0] = offset[1] = kBias;
    }
  }
#pragma unroll
  for (int j = 0; j < tiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = exp2_approx(fmaf(s[j][i], rows.scale[i / 2], offset[i / 2]));
      rows.sum[i / 2] += s[j][i];
    }
  }
  grew = __any_sync(0xffffffffu, grew);
  if (grew) {
    rows.steady = __all_sync(0xffffffffu, !large && rows.max[0] > -INFINITY && rows.max[1] > -INFINITY);
    rows.counts = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.least[r] = 0.999f * exp2_approx(fmaf(rows.positive[r], rows.scale[r], offset[r]));
  }
  return grew;
}

// Weights relative to the rows' maximum so far, as operands, with the lane's sums and, if kCounts, ranks.
template <bool kCounts, int tiles, typename Operand>
__device__ __forceinline__ void weigh_tile(const float (&s)[tiles][4], const SoftmaxRows& rows, float (&sum)[2],
                                           uint32_t (&rank)[2], uint32_t (&weights)[tiles / 2][4], Operand type) {
  AboveCounter counters[] = {AboveCounter(rows.positive[0]), AboveCounter(rows.positive[1])};
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < tiles; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float a = exp2_approx(fmaf(s[j][2 * r], rows.scale[r], rows.offset[r]));
      const float b = exp2_approx(fmaf(s[j][2 * r + 1], rows.scale[r], rows.offset[r]));
      if (kCounts) counters[r](s[j][2 * r]), counters[r](s[j][2 * r + 1]);
      sum[r] += a;
      sum[r] += b;
      weights[j / 2][j % 2 * 2 + r] = pack(a, b, type);
    }
  }
  if (kCounts) rank[0] = counters[0].value(), rank[1] = counters[1].value();
}

// The softmax of a later tile, into the operand `weights`. It takes no new maximum as long as weights do not become
// large, because that takes as long as the exponentials and waits for other lanes. Counting takes turns with
// exponentials, or is left out while no score can be above a positive.
template <int kBias, int tiles, typename Operand>
__device__ __forceinline__ bool softmax_of_next_tile(float (&s)[tiles][4], SoftmaxRows& rows, float (&rescale)[2],
                                                     uint32_t (&weights)[tiles / 2][4], Operand type) {
  constexpr float kMost = kBias > 0 ? 0x1p15f : 0x1p20f;
  const bool steady = rows.steady;
  if (steady) {
    float sum[2];
    uint32_t rank[2] = {};
    if (rows.counts) {
      weigh_tile<true>(s, rows, sum, rank, weights, type);
    } else {
      weigh_tile<false>(s, rows, sum, rank, weights, type);
    }
    if (__all_sync(0xffffffffu, sum[0] <= kMost && sum[1] <= kMost)) {  // not so for NaN
      if (rows.counts) {
        rows.counts = __any_sync(0xffffffffu, (rank[0] | rank[1]) != 0);
      } else if (__any_sync(0xffffffffu, !(sum[0] < rows.least[0]) || !(sum[1] < rows.least[1]))) {
#pragma unroll
        for (int r = 0; r < 2; ++r) rank[r] = count_above<tiles>(s, r, rows.positive[r]);
        rows.counts = true;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) rows.sum[r] += sum[r], rows.rank[r] += rank[r];
      return false;
    }
  }
  const bool grew = softmax_of_tile<kBias>(s, rows, rescale);
  if (steady && !grew) rows.steady = false;  // or the next attempt would fail, too
#pragma unroll
  for (int j = 0; j < tiles; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) weights[j / 2][j % 2 * 2 + r] = pack(s[j][2 * r], s[j][2 * r + 1], type);
  }
  return grew;
}

template <int outputs>
__device__ __forceinline__ void rescale_rows(float (&o)[outputs][4], const float (&rescale)[2]) {
#pragma unroll
  for (int j = 0; j < outputs; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) o[j][i] *= rescale[i / 2];
  }
}

// Both, for sums `o` that no asynchronous product is changing.
template <int tiles, int kBias, int outputs>
__device__ __forceinline__ void online_softmax(float (&s)[tiles][4], float (&o)[outputs][4], SoftmaxRows& rows) {
  float rescale[2];
  if (softmax_of_tile<kBias>(s, rows, rescale)) rescale_rows(o, rescale);  // rare after the first tiles
}

// A bit for each of a lane's scores, number 4 j + 2 r + i.
template <int tiles>
struct MaskBits {
  using Bits = std::conditional_t<tiles * 4 <= 32, uint32_t, uint64_t>;
  static_assert(tiles * 4 <= 64);
  Bits positive = 0;
  Bits same_id = 0;
};

// In a loop that is not unrolled, to need few registers besides the tile's.
template <int tiles>
__device__ __forceinline__ MaskBits<tiles> mask_bits(const InfoNceMask& mask, int64_t row, int64_t n, int64_t first_key,
                                                     int valid, int lane) {
  using Bits = typename MaskBits<tiles>::Bits;
  MaskBits<tiles> bits;
#pragma unroll 1
  for (int at = 0; at < tiles * 4; ++at) {
    const int key_of_tile = at / 4 * 8 + lane % 4 * 2 + at % 2;
    const int64_t key = first_key + key_of_tile;
    const int64_t this_row = row + at / 2 % 2 * 8;
    if (this_row >= n || key_of_tile >= valid) continue;
    bits.positive |= static_cast<Bits>(mask.is_positive(this_row, key)) << at;
    bits.same_id |= static_cast<Bits>(mask.equal_ids(this_row, key)) << at;
  }
  if (mask.same_id_only) bits.same_id = ~bits.same_id;  // here, where few registers are in use
  bits.same_id &= ~bits.positive;
  return bits;
}

template <int tiles>
__device__ __forceinline__ void mask_scores(float (&s)[tiles][4], SoftmaxRows& rows, const InfoNceMask& mask,
                                            int64_t row, int64_t n, int64_t first_key, int valid, int lane) {
  const MaskBits<tiles> bits = mask_bits<tiles>(mask, row, n, first_key, valid, lane);
  const auto masked = bits.positive | (mask.same_id_positive ? 0 : bits.same_id);
  const auto further_positives = mask.same_id_positive ? bits.same_id : 0;
#pragma unroll
  for (int at = 0; at < tiles * 4; ++at) {
    float& x = s[at / 4][at % 4];
    if (masked >> at & 1) x = -INFINITY;
    // softmax_of_tile counts it with the negatives.
    if (further_positives >> at & 1) rows.rank[at / 2 % 2] -= x > rows.positive[at / 2 % 2];
  }
}

// Removes the scores of keys from `valid` on: the last tile may not be full.
template <int tiles>
__device__ __forceinline__ void drop_scores(float (&s)[tiles][4], int valid, int lane) {
#pragma unroll
  for (int j = 0; j < tiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (j * 8 + lane % 4 * 2 + i % 2 >= valid) s[j][i] = -INFINITY;
    }
  }
}

// Adds up the lanes' parts of sum and rank after the last tile.
__device__ __forceinline__ void join_lanes(SoftmaxRows& rows) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int flip = 1; flip < 4; flip *= 2) {
      rows.sum[r] += __shfl_xor_sync(0xffffffffu, rows.sum[r], flip);
      rows.rank[r] += __shfl_xor_sync(0xffffffffu, rows.rank[r], flip);
    }
  }
}

}  // namespace moco_ext::cuda
