// Tests of the emulator's models of Hopper's instructions: a correct kernel is correct under every schedule, and each
// of its faults shows.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "dies.h"
#include "kernels/cuda/cuda_launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/sm90.cuh"

namespace {

namespace sm90 = moco_ext::cuda::sm90;

enum class Fault {
  kNone,
  // Wrong results.
  kNoWaitForCopy,
  kWrongParity,
  kEarlyRelease,
  kWrongStride,
  kReadBeforeWait,
  kNoFence,
  kFenceOfOtherThread,
  kNoBarrier,
  // Abort with a message.
  kWriteBeforeWait,
  kOperandWriteBeforeWait,
  kNoBegin,
  kWriteAfterBegin,
  kNoCommit,
  kTooManyBytes,
  kMissingIssue,
  kDifferentOperands,
  kExitDuringCopies,
  kExitDuringProducts,
  kNoInitFence,
  kOneWarpClaims,
};

constexpr int kTiles = 5, kStages = 2, kTileBytes = 64 * 128;

// out [64, 64] = sum over tiles X_t [64, 64] of (X_t X_t^T) X_t, without the last row of each X_t, which threads zero.
__global__ void cubes(const CUtensorMap map, float* out, Fault fault) {
  MOCO_DYNAMIC_SHARED(raw);
  const uint32_t ring = (sm90::shared_address(raw) + 1023u) & ~1023u;
  const uint32_t full = ring + kStages * kTileBytes, empty = full + 8 * kStages;
  const int thread = static_cast<int>(threadIdx.x);
  const auto at = [&](Fault here) { return fault == here; };
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      sm90::barrier_init(full + 8 * i, 1);
      sm90::barrier_init(empty + 8 * i, 1);
    }
    if (!at(Fault::kNoInitFence)) sm90::barrier_init_done();
  }
  __syncthreads();
  if (thread >= 128) {
    if (thread > 128) return;
    for (int t = 0; t < (at(Fault::kExitDuringCopies) ? kStages : kTiles); ++t) {
      const uint32_t arrived = full + 8 * (t % kStages);
      sm90::barrier_wait(empty + 8 * (t % kStages), sm90::empty_parity(t, kStages));
      sm90::barrier_expect(arrived, kTileBytes + (at(Fault::kTooManyBytes) ? 16 : 0));
      sm90::copy_tensor(ring + t % kStages * kTileBytes, map, 0, 64 * t, arrived);
    }
    return;
  }
  if (at(Fault::kExitDuringCopies)) return;
  if (!at(Fault::kOneWarpClaims) || thread < 32) sm90::claim_registers<240>();
  const __nv_bfloat16 type{};
  float s[8][4] = {}, o[8][4] = {};
  uint32_t p[4][4] = {};
  for (int t = 0; t < kTiles; ++t) {
    const uint32_t tile = ring + t % kStages * kTileBytes;
    const auto release = [&] {
      if (thread == 0) sm90::barrier_arrive(empty + 8 * (t % kStages));
    };
    if (!at(Fault::kNoWaitForCopy))
      sm90::barrier_wait(full + 8 * (t % kStages), sm90::full_parity(t, kStages) ^ at(Fault::kWrongParity));
    if (thread < 16) {
      sm90::store_shared_8(tile + sm90::element_offset(63, thread * 4, kTileBytes), 0, 0);
      if (!at(Fault::kNoFence) && !at(Fault::kFenceOfOtherThread)) sm90::fence_shared();
    } else if (at(Fault::kFenceOfOtherThread)) {
      sm90::fence_shared();
    }
    if (!at(Fault::kNoBarrier)) sm90::warpgroup_barrier(1);

    if (!at(Fault::kNoBegin)) sm90::products_begin();
    if (at(Fault::kWriteAfterBegin) && t > 0) s[0][0] = 1;
    for (int step = 0; step < 4; ++step) {
      if (at(Fault::kMissingIssue) && thread == 77) continue;
      uint64_t operand = sm90::row_operand(tile + 32 * step);
      if (at(Fault::kWrongStride)) operand ^= uint64_t{1} << 32;
      if (at(Fault::kDifferentOperands) && thread == 77) operand += 2;
      sm90::multiply_rows(s, operand, sm90::row_operand(tile + 32 * step), step > 0, type);
    }
    sm90::products_commit();
    if (at(Fault::kWriteBeforeWait)) s[7][3] *= 2;
    if (!at(Fault::kReadBeforeWait)) sm90::products_wait();
    for (int j = 0; j < 8; ++j) {
      for (int r = 0; r < 2; ++r) p[j / 2][j % 2 * 2 + r] = moco_ext::cuda::pack(s[j][2 * r], s[j][2 * r + 1], type);
    }
    if (at(Fault::kReadBeforeWait)) sm90::products_wait();
    sm90::products_begin();
    for (int j = 0; j < 4; ++j) {
      sm90::multiply_columns(o, p[j], sm90::column_operand(tile + 2048 * j, kTileBytes), 1, type);
    }
    if (!at(Fault::kNoCommit)) sm90::products_commit();
    if (at(Fault::kExitDuringProducts) && t == kTiles - 1) return;
    if (at(Fault::kOperandWriteBeforeWait)) ++p[3][3];
    if (at(Fault::kEarlyRelease)) release();
    sm90::products_wait();
    if (!at(Fault::kEarlyRelease)) release();
  }
  for (int i = 0; i < 32; ++i) {
    const auto [row, column] = emu::accumulator_element(thread, i);
    out[row * 64 + column] = o[i / 4][i % 4];
  }
}

bool cubes_are_right(Fault fault) {
  std::vector<__nv_bfloat16> x(kTiles * 64 * 64);
  std::vector<float> exact(64 * 64), got(64 * 64);
  for (size_t i = 0; i < x.size(); ++i) x[i] = __float2bfloat16(static_cast<float>(i * i * 7 % 11 % 3) - 1);
  for (int t = 0; t < kTiles; ++t) {
    const auto value = [&](int row, int column) {
      return row == 63 ? 0 : __bfloat162float(x[static_cast<size_t>((t * 64 + row) * 64 + column)]);
    };
    for (int row = 0; row < 64; ++row) {
      for (int other = 0; other < 64; ++other) {
        float dot = 0;
        for (int i = 0; i < 64; ++i) dot += value(row, i) * value(other, i);
        for (int i = 0; i < 64; ++i) exact[static_cast<size_t>(row * 64 + i)] += dot * value(other, i);
      }
    }
  }
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check::cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
  CUtensorMap map;
  const cuuint64_t sizes[] = {64, kTiles * 64}, strides[] = {128};
  const cuuint32_t box[] = {64, 64}, steps[] = {1, 1};
  reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, x.data(), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check::cuda(moco_ext::cuda::launch(cubes, 1, 160, 1024 + kStages * kTileBytes + 16 * kStages, nullptr, map,
                                     got.data(), fault));
  return got == exact;
}

}  // namespace

int main() {
  check::group("the correct kernel");
  for (uint64_t seed = 0; seed < 32; ++seed) {
    emu::config().seed = seed;
    check::that(cubes_are_right(Fault::kNone), "seed " + std::to_string(seed));
  }
  check::group("faults that give wrong results, under some schedule");
  const auto shows = [](Fault fault, const char* what) {
    int shown = 0;
    for (uint64_t seed = 0; seed < 8; ++seed) {
      emu::config().seed = seed;
      shown += dies(
          [fault] {
            if (!cubes_are_right(fault)) abort();
          },
          "");
    }
    check::that(shown > 0, std::string(what) + ": " + std::to_string(shown) + " of 8 schedules");
  };
  shows(Fault::kNoWaitForCopy, "no wait for a copy");
  shows(Fault::kWrongParity, "the wrong parity");
  shows(Fault::kEarlyRelease, "a stage released before its product has read it");
  shows(Fault::kWrongStride, "a wrong stride in a descriptor");
  shows(Fault::kReadBeforeWait, "accumulators read before the wait");
  shows(Fault::kNoFence, "no fence after writes to an operand");
  shows(Fault::kFenceOfOtherThread, "a fence of a thread that did not write");
  shows(Fault::kNoBarrier, "no barrier between writes to an operand and the products of other warps");
  check::group("faults that abort, under every schedule");
  const auto aborts = [](Fault fault, const char* message) {
    for (const uint64_t seed : {0, 1, 7}) {
      emu::config().seed = seed;
      check::that(dies([fault] { cubes_are_right(fault); }, message),
                  std::string(message) + ", seed " + std::to_string(seed));
    }
  };
  aborts(Fault::kWriteBeforeWait, "accumulators were written before the wait");
  aborts(Fault::kOperandWriteBeforeWait, "operand registers were written before the wait");
  aborts(Fault::kNoBegin, "no products_begin before the product");
  aborts(Fault::kWriteAfterBegin, "were written after products_begin");
  aborts(Fault::kNoCommit, "exited before its products were complete");
  aborts(Fault::kTooManyBytes, "0 arrivals and 16 bytes pending");
  aborts(Fault::kMissingIssue, "threads of a warpgroup issue different products");
  aborts(Fault::kDifferentOperands, "threads of a warpgroup issue different products");
  aborts(Fault::kExitDuringCopies, "the block exited before its tensor copies were complete");
  aborts(Fault::kExitDuringProducts, "exited before its products were complete");
  aborts(Fault::kNoInitFence, "no fence between the initialization of the mbarrier and the copy");
  aborts(Fault::kOneWarpClaims, "only some warps of a warpgroup executed setmaxnreg");
  return check::finish();
}
