// The threads that share a row: some lanes of a warp, a block, or the blocks of a cluster; and the sums over rows.
#pragma once

#include "common/cluster.h"
#include "common/warp.h"
#include "consistency/pair_math.h"

namespace adamix {

constexpr int kPairThreads = 128;       // of a block whose rows have a few lanes each
constexpr int kPairBlockThreads = 512;  // at most, of a block that takes a row
constexpr int kPairWarps = kPairBlockThreads / 32;
constexpr int kPairSums = 4;    // values reduced at a time, at most
constexpr int kPairPhases = 3;  // reductions of a row

struct PairScratch {
  float* warps;   // [kPairPhases, kPairSums, kPairWarps]
  float* blocks;  // [kPairPhases, kPairSums]: a block's own, for its cluster to read
  int* counts;    // [2, kPairWarps]
  float* teams;   // [2, kPairThreads]

  template <typename Memory>
  ADAMIX_BOTH explicit PairScratch(Memory& memory) {
    warps = memory.template take<float>(kPairPhases * kPairSums * kPairWarps);
    blocks = memory.template take<float>(kPairPhases * kPairSums);
    counts = memory.template take<int>(2 * kPairWarps);
    teams = memory.template take<float>(2 * kPairThreads);
  }
};

// combine over the threads of a row, value by value; every one of them gets the result. Lanes: of a row, 0 for a
// cluster of blocks. phase: not that of the call before, whose scratch may still be read.
template <int Lanes, int Count, typename Combine>
ADAMIX_DEVICE void reduce_row(float (&values)[Count], Combine combine, float neutral, const PairScratch& scratch,
                              int phase) {
#pragma unroll
  for (int i = 0; i < Count; ++i) values[i] = warp_reduce<Lanes == 0 ? 32 : Lanes>(values[i], combine);
  if constexpr (Lanes == 0) {
    int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    float* own = scratch.warps + phase * kPairSums * kPairWarps;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i) own[i * kPairWarps + threadIdx.x / 32] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      values[i] = warp_reduce<kPairWarps>(lane % kPairWarps < warps ? own[i * kPairWarps + lane % kPairWarps] : neutral,
                                          combine);
    }
    int size = cluster_size();
    if (size == 1) return;
    float* shown = scratch.blocks + phase * kPairSums;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i) shown[i] = values[i];
    }
    cluster_barrier();
    const float* peer = cluster_peer(shown, lane % 8 < size ? lane % 8 : 0);
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] = warp_reduce<8>(lane % 8 < size ? peer[i] : neutral, combine);
  }
}

// The statistics of a whole row from those of its threads.
template <int Lanes>
ADAMIX_DEVICE void join_statistics(PairStatistics& s, const PairScratch& scratch) {
  float tops[2] = {s.top_a, s.top_b};
  reduce_row<Lanes>(tops, Max{}, negative_infinity(), scratch, 0);
  s.move_to(tops[0], tops[1]);
  float sums[4] = {s.sum_a, s.sum_b, s.total, s.label};
  reduce_row<Lanes>(sums, Add{}, 0.f, scratch, 1);
  s.center = PairStatistics::center_of(sums[0], sums[1]);
  float gaps[2] = {fmaf(-s.center, s.sum_a, s.gap_a), fmaf(-s.center, s.sum_b, s.gap_b)};
  reduce_row<Lanes>(gaps, Add{}, 0.f, scratch, 2);
  s.sum_a = sums[0], s.sum_b = sums[1], s.total = sums[2], s.label = sums[3];
  s.gap_a = gaps[0], s.gap_b = gaps[1];
}

// A row's means from those of its threads; after join_statistics, whose phase 2 lies between both uses of phase 1.
template <int Lanes>
ADAMIX_DEVICE void join_means(PairResult& result, PairMeans means, bool selected, const PairScratch& scratch) {
  reduce_row<Lanes>(means.values, Add{}, 0.f, scratch, 1);
  if (selected) result.mean_p = means.values[0], result.mean_q = means.values[1];
}

ADAMIX_DEVICE float inverse_of(float count) { return count > 0.f ? 1.f / count : 0.f; }

// One over the numbers of rows, or 1 where sums are asked for. Every thread of the block calls.
ADAMIX_DEVICE PairScales find_scales(const PairSums& sums, const PairScratch& scratch) {
  bool labelled = sums.labels.data != nullptr;
  if (sums.known != nullptr) return {sums.known[0], sums.known[labelled ? 1 : 0]};
  if (!sums.mean) return {1.f, 1.f};
  if (sums.items != Kind::kNone) {
    float scale = inverse_of(load_scalar<float>(sums.num_items, sums.items, 0));
    return {scale, scale};
  }
  if (!labelled && sums.mask.data == nullptr) return {0.f, inverse_of(static_cast<float>(sums.rows))};
  int counted = 0, selected = 0;
  for (int64_t row = threadIdx.x; row < sums.rows; row += blockDim.x) {
    PairFlags flags = flags_of(sums, static_cast<int>(row), 0x7fffffff);
    counted += flags.counted, selected += flags.selected;
  }
  counted = warp_reduce(counted, Add{}), selected = warp_reduce(selected, Add{});
  int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) {
    scratch.counts[threadIdx.x / 32] = counted, scratch.counts[kPairWarps + threadIdx.x / 32] = selected;
  }
  __syncthreads();
  counted = selected = 0;
  for (int warp = 0; warp < warps; ++warp) {
    counted += scratch.counts[warp], selected += scratch.counts[kPairWarps + warp];
  }
  return {inverse_of(static_cast<float>(counted)), inverse_of(static_cast<float>(selected))};
}

ADAMIX_DEVICE void store_scales(const PairSums& sums, PairScales scales) {
  if (sums.scales == nullptr) return;
  bool labelled = sums.labels.data != nullptr;
  if (labelled) sums.scales[0] = scales.entropy;
  sums.scales[labelled ? 1 : 0] = scales.pair;
}

// The losses of all rows from their sums; one thread calls.
ADAMIX_DEVICE void store_losses(const PairSums& sums, PairScales scales, float entropy, float pair) {
  if (sums.sums != nullptr) sums.sums[0] = entropy, sums.sums[1] = pair;
  store_scales(sums, scales);
  entropy *= scales.entropy, pair *= scales.pair;
  if (sums.loss != nullptr) *sums.loss = sums.labels.data == nullptr ? pair : entropy + sums.weight * pair;
  if (sums.cross_entropy != nullptr) *sums.cross_entropy = entropy;
  if (sums.consistency != nullptr) *sums.consistency = pair;
  if (sums.factor != nullptr) *sums.factor = shares_of(sums, scales).factor;
}

// A block's (or cluster's) sums over its rows from those of its teams, in their order: into partial, or as the losses
// where there is no other block. Every thread of the block calls.
template <int Lanes>
ADAMIX_DEVICE void store_sums(const PairSums& sums, PairScales scales, const PairScratch& scratch, float entropy,
                              float pair, int group, int groups) {
  if constexpr (Lanes > 0) {
    constexpr int kTeams = kPairThreads / Lanes;
    if (threadIdx.x % Lanes == 0) {
      scratch.teams[threadIdx.x / Lanes] = entropy, scratch.teams[kPairThreads + threadIdx.x / Lanes] = pair;
    }
    __syncthreads();
    entropy = scratch.teams[0], pair = scratch.teams[kPairThreads];
    for (int team = 1; team < kTeams; ++team) {
      entropy += scratch.teams[team], pair += scratch.teams[kPairThreads + team];
    }
  }
  if (threadIdx.x != 0 || (Lanes == 0 && cluster_rank() != 0)) return;
  if (groups == 1) return store_losses(sums, scales, entropy, pair);
  if (sums.partial != nullptr) sums.partial[group] = entropy, sums.partial[groups + group] = pair;
}

template <typename Params>
ADAMIX_DEVICE void store_row(const Params& p, int row, const PairResult& r) {
  if (p.row_losses != nullptr) p.row_losses[row] = r.pair;
  if (p.stats == nullptr) return;
  float* at = p.stats + row;
  int64_t step = p.sums.rows;
  at[0] = r.top_a, at[step] = r.top_b, at[2 * step] = r.log_a, at[3 * step] = r.log_b;
  if (p.full) at[4 * step] = r.mean_p, at[5 * step] = r.mean_q;
}

}  // namespace adamix
