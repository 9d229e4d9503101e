// The queries of the Hopper pass (info_nce_sm90.cuh): each block prepares its own, as info_nce_prepare_kernel does for
// other passes, so that no kernel has to run before the pass. Instructions are few, because a block runs them once, and
// each has to arrive from memory.
#pragma once

#include "kernels/cuda/info_nce_sm90_ring.cuh"

namespace moco_ext::cuda {

constexpr int kSm90QueryRows = 4;  // that a lane has part of, of a warp's 16

// Lane l has columns 4 (l % 8) + 32 u of row i + 4 (l / 8), for i < 4. Then the lanes of a half-warp that store eight
// bytes each to a swizzled tile share no bank.
__device__ __forceinline__ int query_row(int i, int lane) { return i + lane / 8 * kSm90QueryRows; }
__device__ __forceinline__ int query_column(int u, int lane) { return lane % 8 * 4 + 32 * u; }

// The row that a lane computes the scalars of.
__device__ __forceinline__ int scalar_row(int lane) { return query_row(lane % 4, lane); }

// x[i] of all lanes with row i -> the sum of the lane's scalar_row.
__device__ __forceinline__ float sum_of_scalar_row(const float (&x)[kSm90QueryRows], int lane) {
  const auto exchange = [](bool upper, int flip, float low, float high) {
    return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, flip);
  };
  const bool odd = lane % 2 == 1;
  const float sum = exchange(lane / 2 % 2 == 1, 2, exchange(odd, 1, x[0], x[1]), exchange(odd, 1, x[2], x[3]));
  return sum + __shfl_xor_sync(0xffffffffu, sum, 4);
}

template <int units>
struct Sm90QueryUnits {
  float x[kSm90QueryRows][units][4];

  // Columns from `first` on of a warp's rows [n, c]; the rest is 0. 16-bit elements are not converted yet, two in each
  // of the first words, so that all loads are in flight before the first is used.
  __device__ __forceinline__ void load(const void* rows, Dtype type, int n, int c, int first, int lane) {
    const auto for_each = [&](auto&& load_unit) {
      const int start = query_row(0, lane) * c;
#pragma unroll
      for (int i = 0; i < kSm90QueryRows; ++i) {
#pragma unroll
        for (int u = 0; u < units; ++u) {
          const int column = first + query_column(u, lane);
          load_unit(x[i][u], query_row(i, lane) < n && column < c, start + i * c + column);
        }
      }
    };
    if (type == Dtype::kFloat32) {
      for_each([&](float (&to)[4], bool valid, int at) {
        to[0] = to[1] = to[2] = to[3] = 0.0f;
        if (valid) load_floats<4>(static_cast<const float*>(rows) + at, to);
      });
    } else {
      for_each([&](float (&to)[4], bool valid, int at) {
        const uint2 words = valid ? load_packed<4>(static_cast<const __half*>(rows) + at) : uint2{};
        to[0] = __uint_as_float(words.x), to[1] = __uint_as_float(words.y);
      });
    }
  }
  __device__ __forceinline__ void convert(Dtype type) {
    const auto for_each = [&](auto element) {
#pragma unroll
      for (int at = 0; at < kSm90QueryRows * units; ++at) {
        float (&unit)[4] = x[at / units][at % units];
        unpack<4, decltype(element)>(make_uint2(__float_as_uint(unit[0]), __float_as_uint(unit[1])), unit);
      }
    };
    if (type == Dtype::kBFloat16) for_each(__nv_bfloat16{});
    if (type == Dtype::kFloat16) for_each(__half{});
  }
};

// Prepares a warp's rows from `warp_row` on, for its block's operand in shared memory: panels of a swizzled tile, from
// row `panel_row` on. If `writes`, what combine reads goes to device memory. Arrives at `arrived` when all queries have
// arrived. float32: `words` is the first term as an operand in registers, and shared memory has the others.
//
// The operand is the queries times a power of two, with norms in [0.5, 1) * kScale: fp16 holds them, and bfloat16
// queries for a bfloat16 queue are not rounded. row_scale is the factor from there to unit rows.
template <typename Tile, bool kMasked, int kSteps>
__device__ __forceinline__ SoftmaxRows prepare_rows(const Sm90Arguments& arguments, int64_t warp_row, bool writes,
                                                    uint32_t shared, int panel_row, uint32_t arrived,
                                                    uint32_t (&words)[kSteps][4]) {
  constexpr int kRows = kSm90QueryRows;
  constexpr int kPassPanels = Tile::kPanels < 2 ? 1 : 2;  // more take too many registers
  constexpr int kPasses = Tile::kPanels / kPassPanels;
  constexpr int kUnits = 2 * kPassPanels;
  constexpr float kDown = 0x1p-80f;
  static_assert(!Tile::kSplit || kPasses == 1);
  const InfoNceQueries& queries = arguments.queries;
  const InfoNceOperand<void>& operand = arguments.operand;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int c = arguments.c;
  const int n = static_cast<int>(max(int64_t{0}, min(arguments.n - warp_row, int64_t{4 * kRows})));
  const Dtype type = queries.type;
  const int64_t start = warp_row * c;
  const auto from_warp_row = [&](const void* rows, Dtype of) -> const void* {
    return static_cast<const char*>(rows) + start * (of == Dtype::kFloat32 ? 4 : 2);
  };
  const bool has_key = queries.key != nullptr;
  const bool has_anchor = has_key || queries.target != nullptr;
  const Dtype anchor_type = has_key ? type : Dtype::kFloat32;
  const void* const query_rows = from_warp_row(queries.query, type);
  const void* const anchor_rows = from_warp_row(has_key ? queries.key : queries.target, anchor_type);
  const auto of_row = [&](float x, int i) { return __shfl_sync(0xffffffffu, x, lane / 8 * 8 + i); };

  Sm90QueryUnits<kUnits> query;
  float square;  // these are of the lane's scalar_row
  float anchor_square;
  float dot;
  float down = 1.0f;  // of the elements before they are squared
  float anchor_down = 1.0f;
#pragma unroll 1
  for (bool again = false;; again = true) {
    float squares[kRows] = {};
    float anchor_squares[kRows] = {};
    float dots[kRows] = {};
#pragma unroll 1
    for (int first = 0; first < 64 * Tile::kPanels; first += 64 * kPassPanels) {
      Sm90QueryUnits<kUnits> anchor;
      query.load(query_rows, type, n, c, first, lane);
      anchor.load(anchor_rows, anchor_type, has_anchor ? n : 0, c, first, lane);
      query.convert(type);
      anchor.convert(anchor_type);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (again) {
          const float row_down = of_row(down, i);
          const float row_anchor_down = of_row(anchor_down, i);
#pragma unroll
          for (int j = 0; j < 4 * kUnits; ++j) {
            query.x[i][j / 4][j % 4] *= row_down;
            anchor.x[i][j / 4][j % 4] *= row_anchor_down;
          }
        }
#pragma unroll
        for (int j = 0; j < 4 * kUnits; ++j) {
          const float x = query.x[i][j / 4][j % 4];
          const float y = anchor.x[i][j / 4][j % 4];
          squares[i] = fmaf(x, x, squares[i]);
          anchor_squares[i] = fmaf(y, y, anchor_squares[i]);
          dots[i] = fmaf(x, y, dots[i]);
        }
      }
    }
    square = sum_of_scalar_row(squares, lane);
    anchor_square = sum_of_scalar_row(anchor_squares, lane);
    dot = sum_of_scalar_row(dots, lane);
    // A square overflows, the norm may not.
    if (again || !__any_sync(0xffffffffu, isinf(square) || isinf(anchor_square))) break;
    if (isinf(square)) down = kDown;
    if (isinf(anchor_square)) anchor_down = kDown;
  }
  if (lane == 0) sm90::barrier_arrive(arrived);

  const RowOptions options{n, c, queries.eps, queries.normalize};
  const float up = down == 1.0f ? 1.0f : 1.0f / kDown;
  const float anchor_up = anchor_down == 1.0f ? 1.0f : 1.0f / kDown;
  const float norm = sqrtf(square) * up;
  const float key_norm = has_key ? sqrtf(anchor_square) * anchor_up : 1.0f;
  const float inverse = 1.0f / options.divisor(norm);
  const float inverse_key = has_key ? 1.0f / options.divisor(key_norm) : 1.0f;
  const float positive = dot * (inverse * up) * (inverse_key * anchor_up);
  const int exponent =
      min(max(static_cast<int>(__float_as_uint(norm) >> 23) - 126, -75), 126);  // below 2^-75, squares are 0
  const float row_scale = power_of_two(exponent) * inverse / Tile::kScale;
  const float scale = power_of_two(-exponent) * (kPasses == 1 ? up : 1.0f) * Tile::kScale;
  if (const int row = scalar_row(lane); writes && lane % 8 < kRows && row < n) {
    operand.norm[warp_row + row] = norm;
    operand.key_norm[warp_row + row] = key_norm;
    operand.positive[warp_row + row] = positive;
    operand.row_scale[warp_row + row] = row_scale;
    if (warp_row + row == 0) *operand.finished = 0;
  }

  const typename Tile::Operand to{};
  const auto address = [&](int i, int u, int first) {
    return shared +
           sm90::element_offset(panel_row + query_row(i, lane), first + query_column(u, lane), Tile::kQueryPanelBytes);
  };
#pragma unroll 1
  for (int first = 0; first < 64 * Tile::kPanels; first += 64 * kPassPanels) {
    if constexpr (kPasses > 1) {
      query.load(query_rows, type, n, c, first, lane);
      query.convert(type);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float of_this = of_row(scale, i);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        float (&x)[4] = query.x[i][u];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] *= of_this;
        if constexpr (Tile::kSplit) {
          store_terms<0, 1>(make_float4(x[0], x[1], x[2], x[3]), address(i, u, first), 0, to);
        } else {
          sm90::store_shared_8(address(i, u, first), pack(x[0], x[1], to), pack(x[2], x[3], to));
        }
        if constexpr (kMasked) {  // for what removes masked keys from the sums
          using Element = std::conditional_t<Tile::kSplit, float, typename Tile::Operand>;
          const int row = query_row(i, lane);
          const int column = first + query_column(u, lane);
          if (writes && row < n && column < c) {
            store_floats<4>(static_cast<Element*>(operand.rows) + start + row * c + column, x);
          }
        }
      }
    }
  }
  if constexpr (Tile::kSplit) {
    __syncwarp();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[step][i] = __float_as_uint(sm90::load_shared_4(
            shared + sm90::element_offset(panel_row + lane / 4 + i % 2 * 8, step * 16 + i / 2 * 8 + lane % 4 * 2,
                                          Tile::kQueryPanelBytes)));
      }
    }
    __syncwarp();
    if constexpr (Tile::kTerms > 1) {
#pragma unroll
      for (int at = 0; at < kRows * kUnits; ++at) {
        const float (&x)[4] = query.x[at / kUnits][at % kUnits];
        store_terms<1, Tile::kTerms>(make_float4(x[0], x[1], x[2], x[3]), address(at / kUnits, at % kUnits, 0),
                                     Tile::kQueryPlaneBytes, to);
      }
    }
  }
  sm90::fence_shared();

  float positives[2];  // of the lane's rows in products, lane / 4 and 8 further
  float row_scales[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int holder = lane / 16 * 8 + lane / 4 % 4 + 16 * r;
    positives[r] = __shfl_sync(0xffffffffu, positive, holder);
    row_scales[r] = __shfl_sync(0xffffffffu, row_scale, holder) / Tile::kScale;  // of keys as well
  }
  return start_rows(arguments, positives, row_scales);
}

}  // namespace moco_ext::cuda
