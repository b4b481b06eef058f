// The first product of routed LoRA's forward where rows are 16-byte pieces: t of a team's rows.
#pragma once

#include "routed_lora/narrow_quads.h"
#include "routed_lora/routed_lora.h"

namespace adamix {

// Tiles: of 8 columns of t, all groups'.
template <typename T, int Tiles>
struct LoraTeam {
  // Of 16 rows, that a warp has in the first product. Both of them read the weights once for 32 rows; 6 tiles of both
  // spill 20 bytes, and are 4 steps of 112 instructions instead of 8 of 91.
  static constexpr int kHalves = Tiles == 4 || Tiles == 8 ? 1 : 2;
  static constexpr int kShares = kTeamWarps / 2 * kHalves;  // of x's columns
  static constexpr int kDepth = Tiles > 4 ? 1 : 2;          // steps under way at a time
  static constexpr int kPitch = 8 * (Tiles | 1);            // an odd number of 32 bytes: no bank twice
  static constexpr int kWhole = Tiles > 2 ? Tiles - 2 : 1;  // tiles whose columns are always there
  static constexpr int kInnerTiles = (Tiles + 1) / 2;       // of 16 columns of t, a group's

  float* sums;  // [kShares, kTeamRows, kPitch]
  NarrowQuads<T> narrow;
  int* wide_expert;  // [kTeamRows]

  template <typename Memory>
  ADAMIX_BOTH LoraTeam(Memory& memory, int groups, int rank, int teams, int team)
      : sums(memory.template take<float>(teams * kShares * kTeamRows * kPitch) + team * kShares * kTeamRows * kPitch),
        narrow(memory, groups, rank, teams, team),
        wide_expert(memory.template take<int>(teams * kTeamRows) + team * kTeamRows) {}
};

// The warp's part of dropout(x) A^T into its place in team.sums, and the rows' wide experts; complete after a barrier.
// Warps that load the same weights are neighbours. x is asked for before the ids are known.
template <typename T, int Tiles>
ADAMIX_DEVICE void multiply_share(const RoutedLoraForward<T>& p, const LoraTeam<T, Tiles>& team, const LaneRows& at) {
  using Team = LoraTeam<T, Tiles>;
  constexpr int kDepth = Team::kDepth, kHalves = Team::kHalves, kShares = Team::kShares;
  int ranks = p.ranges.groups * p.rank, steps = ceil_div(p.features, kStep);
  int share = kHalves == 1 ? at.warp / 2 : at.warp, first = kHalves == 1 ? at.warp % 2 * 2 : 0;  // of the lane's rows
  float sums[kHalves][Tiles][4] = {};
  const T* x[2 * kHalves];
#pragma unroll
  for (int i = 0; i < 2 * kHalves; ++i) x[i] = p.x.data + p.x.offset(at.number(first + i)) + share * kStep + 8 * at.q;
  DropoutMask mask(p.dropout);
  DropoutMask::RowKeys own{};  // of row `lane`
  if (mask.drops()) own = mask.of_row(at.first + at.lane);
  TeamExperts experts;
  // Row g of the weights, the bytes of a row, and how many rows follow. The lanes behind the last row take that one;
  // their sums are not used.
  const T* weights =
      p.lora_a + static_cast<int64_t>(at.g < ranks ? at.g : ranks - 1) * p.features + share * kStep + 8 * at.q;
  uint32_t row_bytes = static_cast<uint32_t>(sizeof(T)) * p.features, follow = ranks - 1 - at.g;
  if (Team::kWhole < Tiles) forget(follow);
  int64_t apart = static_cast<int64_t>(ranks) * p.features, served = 0;  // to the next expert, to the one of all rows
  uint32_t zero = Tiles > 1 ? unseen_zero(p.rows) : 0;                   // one product waits for x and weights alike
  for (int step = share; step < steps; step += kDepth * kShares, weights += kDepth * kShares * kStep) {
    uint4 rows[kDepth][2 * kHalves];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int col = (step + d * kShares) * kStep;
      bool inside = col + 8 * at.q < p.features;
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) {
        rows[d][i] = inside ? load_words<uint4>(x[i] + d * kShares * kStep) : uint4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) x[i] += kDepth * kShares * kStep;
    if (step == share) {
      LaneRouting routing(at, p.a, p.b);
      experts = TeamExperts(routing.narrow, at);
      if (experts.lowest != kNoExpert) served = experts.lowest * apart;
      if (at.warp == 0) team.wide_expert[at.lane] = routing.wide;
    }
    if (mask.drops()) {
      DropoutMask::RowKeys keys[2 * kHalves];
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) {
        keys[i] = {shuffle_from(own.factor, at.row(first + i)), shuffle_from(own.offset, at.row(first + i))};
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        DropoutMask::EightColumns columns((step + d * kShares) * kStep + 8 * at.q);
#pragma unroll
        for (int i = 0; i < 2 * kHalves; ++i) rows[d][i] = mask.kept(rows[d][i], keys[i], columns);
      }
    }
    forget(row_bytes);
    OperandRows quads[kDepth][kHalves];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        quads[d][half] = OperandRows(rows[d][2 * half], rows[d][2 * half + 1], zero);
      }
    }
    auto multiply = [&](const T* of_expert, int tile, auto sums_of) {
      uint32_t row = tile < Team::kWhole || 8u * tile < follow ? 8u * tile : follow;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        bool inside = (step + d * kShares) * kStep + 8 * at.q < p.features;
        const T* from = of_expert + d * kShares * kStep;
        auto bytes = static_cast<int64_t>(static_cast<uint64_t>(row) * row_bytes);
        uint4 b = inside ? load_piece_at(from, bytes) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) quads[d][half].template multiply_step<T>(sums_of(half), b);
      }
    };
    if (experts.one) {
      if (experts.lowest == kNoExpert) continue;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        multiply(weights + served, tile, [&](int half) -> float (&)[4] { return sums[half][tile]; });
      }
      continue;
    }
    for (int expert = experts.lowest; expert != kNoExpert; expert = experts.after(expert)) {
      bool mine[2 * kHalves];
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) mine[i] = experts.of_row(at.row(first + i)) == expert;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        float own[kHalves][4] = {};
        multiply(weights + expert * apart, tile, [&](int half) -> float (&)[4] { return own[half]; });
#pragma unroll
        for (int e = 0; e < 4 * kHalves; ++e) {
          if (mine[e / 2]) sums[e / 4][tile][e % 4] += own[e / 4][e % 4];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kHalves; ++i) {
    float* to = team.sums + (share * kTeamRows + at.row(first + i)) * Team::kPitch + 2 * at.q;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const float* from = sums[i / 2][tile] + i % 2 * 2;
      store_words(to + 8 * tile, FloatPair{from[0], from[1]});
    }
  }
}

// t of the team's rows = the warps' sums, added in their order; complete in team.narrow after a barrier.
template <typename T, int Tiles>
ADAMIX_DEVICE void add_shares(const RoutedLoraForward<T>& p, const LoraTeam<T, Tiles>& team, const LaneRows& at) {
  constexpr int kShares = LoraTeam<T, Tiles>::kShares, kPitch = LoraTeam<T, Tiles>::kPitch;
  int ranks = p.ranges.groups * p.rank;
  float scale = p.dropout.seed == nullptr ? 1.f : p.dropout.scale;
#pragma unroll
  for (uint32_t pair = at.thread(); pair < kTeamRows * 4 * Tiles; pair += kTeamThreads) {
    int row = pair / (4 * Tiles), col = pair % (4 * Tiles) * 2;
    if (row >= at.count || col >= ranks) continue;
    const float* from = team.sums + row * kPitch + col;
    FloatPair sum{};
#pragma unroll
    for (int of = 0; of < kShares; ++of) {
      FloatPair part = load_words<FloatPair>(from + of * kTeamRows * kPitch);
      sum = {sum.low + part.low, sum.high + part.high};
    }
    if (team.wide_expert[row] == kNoExpert) sum = {not_a_number(), not_a_number()};
    uint32_t t = word_of<T>(sum.low * scale, sum.high * scale);
    int group = p.ranges.groups == 1 ? 0 : col / p.rank;
    store_words(p.t + (at.first + row) * ranks + col, t);
    team.narrow.store(row, group, col - group * p.rank, t);
  }
}

}  // namespace adamix
