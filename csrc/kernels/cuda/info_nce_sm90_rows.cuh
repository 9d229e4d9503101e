// What the Hopper passes share: their arguments, and the rows of a consumer warpgroup from start to end.
#pragma once

#include "kernels/cuda/info_nce_rows.cuh"
#include "kernels/cuda/info_nce_sm90_launch.cuh"
#include "kernels/cuda/info_nce_softmax.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/sm90.cuh"

namespace moco_ext::cuda {

constexpr int kSm90GroupRows = 64;

struct Sm90Arguments {
  CUtensorMap query_map;  // wide rows: boxes of [64 rows, 64 columns] of the query operand
  CUtensorMap key_map;    // boxes of [kKeys rows, 128 bytes]
  int64_t n;              // here, for the alignment of what follows: the main loop reads it with fewer instructions
  InfoNceQueries queries;
  InfoNceOperand<void> operand;
  InfoNcePartials partials;
  int c;
  int splits;
  int streams;  // 2: each warpgroup has its own split; 1: each has its own rows
  InfoNceKeyCount count;
  InfoNceMask mask;
  InfoNceTemperature temperature;
};

// Of the two rows that a lane has part of.
__device__ __forceinline__ SoftmaxRows start_rows(const Sm90Arguments& arguments, const float (&positive)[2],
                                                  const float (&row_scale)[2]) {
  SoftmaxRows rows{};
  const float log2_scale = 1.44269504f / arguments.temperature.value();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.positive[r] = positive[r] / row_scale[r];
    rows.scale[r] = row_scale[r] * log2_scale;
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

}  // namespace moco_ext::cuda
