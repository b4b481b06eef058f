// The threads that share a row: some lanes of a warp, a block, or the blocks of a cluster; and the sums over rows.
#pragma once

#include "common/cluster.h"
#include "common/warp.h"
#include "consistency/pair_math.h"

namespace adamix {

constexpr int kPairWarps = kPairBlockThreads / 32;
constexpr int kPairSums = 8;     // of a warp's share of a row: both gaps, lean, total, then sum_a twice, sum_b, center
constexpr int kPairValues = 16;  // of a block's share of a row, at most
constexpr int kPairCluster = 8;  // blocks, at most

// Threads of a block whose rows have `Lanes` of them each; 0: it takes a row, or a part of one.
ADAMIX_BOTH constexpr int threads_of(int lanes) { return lanes == 32 ? 128 : kPairBlockThreads; }

struct PairScratch {
  float* tops;         // [2, kPairWarps]
  float* warps;        // [kPairWarps, kPairSums]: what a block's warps have found
  float* blocks;       // [2, kPairCluster, kPairValues]: and its cluster's blocks, for one row and the next
  PairSlopes* slopes;  // of the block's row
  int* counts;         // [2, kPairWarps]
  float* teams;        // [2, kPairBlockThreads / 4]

  template <typename Memory>
  ADAMIX_BOTH explicit PairScratch(Memory& memory) {
    tops = memory.template take<float>(2 * kPairWarps);
    warps = memory.template take<float>(kPairWarps * kPairSums);
    blocks = memory.template take<float>(2 * kPairCluster * kPairValues);
    slopes = memory.template take<PairSlopes>(1);
    counts = memory.template take<int>(2 * kPairWarps);
    teams = memory.template take<float>(2 * kPairBlockThreads / 4);
  }
};

struct Larger {
  ADAMIX_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The largest of a warp's values, none of which is NaN.
ADAMIX_DEVICE float largest_of_warp(float value) {
#if ADAMIX_ARCH >= 800
  // Ordered as integers: what is below 0 has its other bits turned round.
  int bits = __float_as_int(value), order = bits ^ (bits >> 31 & 0x7fffffff);
  order = __reduce_max_sync(0xffffffffu, order);
  return __int_as_float(order ^ (order >> 31 & 0x7fffffff));
#else
  return warp_reduce<32>(value, Larger{});
#endif
}

// Both maxima over the threads of a row in this block, of so many warps; every one of them gets them. A barrier must
// lie between two calls, as join_sums has one.
template <int Lanes>
ADAMIX_DEVICE void join_tops(float& a, float& b, const PairScratch& scratch, int warps) {
  if constexpr (Lanes == 4) {
    a = warp_reduce<Lanes>(a, Larger{}), b = warp_reduce<Lanes>(b, Larger{});
  } else {
    a = largest_of_warp(a), b = largest_of_warp(b);
  }
  if constexpr (Lanes == 0) {
    int lane = threadIdx.x % 32;
    if (lane == 0) scratch.tops[threadIdx.x / 32] = a, scratch.tops[kPairWarps + threadIdx.x / 32] = b;
    __syncthreads();
    // Half a warp for each of both.
    float top = lane % kPairWarps < warps ? scratch.tops[lane] : negative_infinity();
    top = warp_reduce<kPairWarps>(top, Larger{});
    a = shuffle_from(top, 0), b = shuffle_from(top, kPairWarps);
  }
}

// Each of two or four values summed over a warp; its N-th parts get a sum each, in their order. The first steps halve
// what a lane holds.
template <int N>
ADAMIX_DEVICE float sum_warp(float (&values)[N]) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int count = N / 2; count > 0; count /= 2) {
    bool upper = lane & count * (32 / N);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float sent = upper ? values[i] : values[i + count], kept = upper ? values[i + count] : values[i];
      values[i] = kept + shuffle_xor(sent, count * (32 / N));
    }
  }
  return warp_reduce<32 / N>(values[0], Add{});
}

// A row's statistics from those of its lanes, at most a warp; every one of them gets them.
template <int Lanes>
ADAMIX_DEVICE void join_lanes(PairStatistics& s) {
  auto sum = [](float (&values)[4]) {
    if constexpr (Lanes == 32) {
      float found = sum_warp(values);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = shuffle_from(found, 8 * i);
    } else {
#pragma unroll
      for (float& value : values) value = warp_reduce<Lanes>(value, Add{});
    }
  };
  float sums[4] = {s.sum_a, s.sum_b, s.total, s.label}, own_a = s.sum_a, own_b = s.sum_b;
  sum(sums);
  s.sum_a = sums[0], s.sum_b = sums[1], s.total = sums[2], s.label = sums[3];
  s.center = s.center_of_sums();
  float step = -s.center * kSmall;
  float gaps[4] = {fmaf(step, own_a, s.gap_a), fmaf(step, own_b, s.gap_b), s.lean, 0.f};
  sum(gaps);
  s.gap_a = gaps[0], s.gap_b = gaps[1], s.lean = gaps[2];
}

// A warp's share of a row but for its label, for join_warps after a barrier. A barrier must lie behind that too.
ADAMIX_DEVICE void leave_share(const PairStatistics& s, const PairScratch& scratch) {
  float sums[2] = {s.sum_a, s.sum_b}, found = sum_warp(sums);
  float center = rough_center(shuffle_from(found, 0), shuffle_from(found, 16)), step = -center * kSmall;
  float others[4] = {fmaf(step, s.sum_a, s.gap_a), fmaf(step, s.sum_b, s.gap_b), s.lean, s.total};
  float other = sum_warp(others);
  int lane = threadIdx.x % 32;
  if (lane % 8 != 0) return;
  float* to = scratch.warps + threadIdx.x / 32 * kPairSums + lane / 8;
  to[0] = other, to[4] = lane == 24 ? center : found;
}

// The block's share; one warp calls.
ADAMIX_DEVICE void join_warps(PairStatistics& s, const PairScratch& scratch) {
  int warp = threadIdx.x % kPairWarps;
  float part[kPairSums] = {};
  if (warp < static_cast<int>(blockDim.x) / 32) {
#pragma unroll
    for (int i = 0; i < kPairSums; ++i) part[i] = scratch.warps[warp * kPairSums + i];
  }
  auto whole = [](float value) { return warp_reduce<kPairWarps>(value, Add{}); };
  s.sum_a = whole(part[4]), s.sum_b = whole(part[6]), s.total = whole(part[3]), s.lean = whole(part[2]);
  s.center = s.center_of_sums();
  // From one center to the other in one step, which is small where they are close.
  float step = (part[7] - s.center) * kSmall;
  s.gap_a = whole(fmaf(step, part[4], part[0])), s.gap_b = whole(fmaf(step, part[6], part[1]));
}

// A block's share of a row goes to all blocks of its cluster, which have it after cluster_arrive and cluster_wait. One
// warp calls. turn: 0 and 1 by turns.
ADAMIX_DEVICE void send_share(const PairStatistics& s, const PairScratch& scratch, int turn) {
  float* own = scratch.blocks + (turn * kPairCluster + cluster_rank()) * kPairValues;
  const float values[] = {s.top_a, s.top_b, s.sum_a, s.sum_b, s.gap_a, s.gap_b, s.total, s.label, s.lean, s.center};
  float value = values[0];
  int lane = threadIdx.x % 32, which = lane % kPairValues;
#pragma unroll
  for (int i = 1; i < 10; ++i) value = which == i ? values[i] : value;
  for (int peer = lane / kPairValues; peer < cluster_size(); peer += 32 / kPairValues) {
    cluster_store(own + which, peer, value);
  }
  __syncwarp();
}

// The maxima alone of what the cluster's blocks have sent; every thread may call.
ADAMIX_DEVICE void take_tops(float& top_a, float& top_b, const PairScratch& scratch, int turn) {
  int rank = threadIdx.x % kPairCluster;
  const float* from = scratch.blocks + (turn * kPairCluster + rank) * kPairValues;
  bool has = rank < cluster_size();
  top_a = warp_reduce<kPairCluster>(has ? from[0] : negative_infinity(), Larger{});
  top_b = warp_reduce<kPairCluster>(has ? from[1] : negative_infinity(), Larger{});
}

// The statistics of the whole row from its blocks' shares; one warp calls. columns(rank): how many columns of it that
// block has.
template <typename Columns>
ADAMIX_DEVICE void take_shares(PairStatistics& s, const PairScratch& scratch, int turn, Columns columns) {
  int rank = threadIdx.x % kPairCluster;
  PairStatistics part;
  part.start(negative_infinity(), negative_infinity());
  if (rank < cluster_size()) {
    const float* from = scratch.blocks + (turn * kPairCluster + rank) * kPairValues;
    part = {from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7], from[9], from[8]};
  }
  auto whole = [](float value, auto combine) { return warp_reduce<kPairCluster>(value, combine); };
  s.start(whole(part.top_a, Larger{}), whole(part.top_b, Larger{}));
  float rise_a = finite_top(s.top_a) - finite_top(part.top_a), rise_b = finite_top(s.top_b) - finite_top(part.top_b);
  float decay_a = expf(part.top_a - finite_top(s.top_a)), decay_b = expf(part.top_b - finite_top(s.top_b));
  s.sum_a = whole(part.sum_a * decay_a, Add{}), s.sum_b = whole(part.sum_b * decay_b, Add{});
  s.total = whole(part.total - columns(rank) * rise_a, Add{}), s.label = whole(part.label, Add{});
  s.lean = whole(part.lean, Add{});  // whose maxima are the row's already
  s.center = s.center_of_sums();
  // From one center to the other in one step, which is small where they are close.
  float step = (part.center - (rise_a - rise_b) - s.center) * kSmall;
  s.gap_a = whole(decay_a == 0.f ? 0.f : fmaf(step, part.sum_a, part.gap_a) * decay_a, Add{});
  s.gap_b = whole(decay_b == 0.f ? 0.f : fmaf(step, part.sum_b, part.gap_b) * decay_b, Add{});
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
  if (labelled && sums.mask.data == nullptr && sums.labels.inner.by == 1) {
    // Every block counts, so this is a share of what few rows cost.
    auto count = [&](const auto* labels) {
#pragma unroll 4
      for (int64_t row = threadIdx.x; row < sums.rows; row += blockDim.x) {
        counted += labels[row * sums.labels.outer_stride] != sums.ignore_index;
      }
    };
    if (sums.wide_labels) {
      count(static_cast<const int64_t*>(sums.labels.data));
    } else {
      count(static_cast<const int32_t*>(sums.labels.data));
    }
    selected = counted;
  } else {
#pragma unroll 4
    for (int64_t row = threadIdx.x; row < sums.rows; row += blockDim.x) {
      PairFlags flags = flags_of(sums, static_cast<int>(row), 0x7fffffff);
      counted += flags.counted, selected += flags.selected;
    }
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
}

// A block's (or cluster's) sums over its rows from those of its teams, in their order: into partial, or as the losses
// where there is no other block. Every thread of the block calls.
template <int Lanes>
ADAMIX_DEVICE void store_sums(const PairSums& sums, PairScales scales, const PairScratch& scratch, float entropy,
                              float pair, int group, int groups) {
  if constexpr (Lanes > 0) {
    constexpr int kTeams = threads_of(Lanes) / Lanes;
    if (threadIdx.x % Lanes == 0) {
      scratch.teams[threadIdx.x / Lanes] = entropy, scratch.teams[kTeams + threadIdx.x / Lanes] = pair;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    entropy = pair = 0.f;
    for (int team = threadIdx.x; team < kTeams; team += 32) {
      entropy += scratch.teams[team], pair += scratch.teams[kTeams + team];
    }
    entropy = warp_reduce(entropy, Add{}), pair = warp_reduce(pair, Add{});
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
