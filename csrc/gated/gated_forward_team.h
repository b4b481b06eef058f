// What the forwards with gates do with a team's rows of 16-byte pieces: the first product, what gates make of it, and
// the second.
#pragma once

#include "gated/gated_team.h"

namespace adamix {

// Columns of the up side's operand, of a group: all experts' ranks, and from a multiple of 16 on the biases' gates.
template <typename T>
ADAMIX_BOTH int up_cols(const GatedForward<T>& p) {
  int cols = p.gates.up.experts * p.rank;
  return p.up_bias == nullptr ? cols : round_up(cols, 16) + p.gates.up.experts;
}

// More: eights of columns that ride in the first product beside the narrow ones.
template <typename T, int More = 0>
struct GatedTeam {
  static constexpr int kTiles = kChunkRanks / 8;
  static constexpr int kPitch = 8 * ((kTiles + More) | 1);  // an odd number of 32 bytes: no bank twice

  float* sums;  // [kTeamShares, kTeamRows, kPitch]
  TeamValues<T> t;
  NarrowRows<T> narrow;
  SlotTable<T> table;

  template <typename Memory>
  ADAMIX_BOTH GatedTeam(Memory& memory, const GatedForward<T>& p)
      : sums(memory.template take<float>(kTeamShares * kTeamRows * kPitch)),
        t(memory, p.gates.down.experts * p.ranks()),
        narrow(memory, p.ranges.groups, up_cols(p), 1, 0),
        table(memory, p.gates) {}
};

constexpr int kDownDepth = 2;  // steps of x that a warp of the first product has in registers

// Columns that ride in the first product: none.
struct NoMore {
  static constexpr bool kRides = false;
};

// The warp's part of dropout(x) A^T, of narrow columns from col0 on, into its place in team.sums. more: columns that
// are multiplied by x itself while it is in registers.
template <typename T, typename Team, typename More>
ADAMIX_DEVICE void multiply_down(const GatedForward<T>& p, const Team& team, const LaneRows& at, int col0, int cols,
                                 More more) {
  constexpr int kDepth = kDownDepth;
  int steps = ceil_div(p.features, kStep), tiles = ceil_div(cols - col0, 8);
  int share = at.warp / 2, first = at.warp % 2 * 2;  // of the lane's rows
  float sums[Team::kTiles][4] = {};
  const T* x[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) x[i] = p.x.data + p.x.offset(at.number(first + i)) + 8 * at.q;
  DropoutMask mask(p.dropout);
  DropoutMask::RowKeys keys[2] = {};
  if (mask.drops()) {
#pragma unroll
    for (int i = 0; i < 2; ++i) keys[i] = mask.of_row(at.first + at.row(first + i));
  }
  int64_t row_bytes = static_cast<int64_t>(sizeof(T)) * p.features;
  forget(row_bytes);
  for (int step = share; step < steps; step += kDepth * kTeamShares) {
    uint4 rows[kDepth][2];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int col = (step + d * kTeamShares) * kStep;
      bool inside = col + 8 * at.q < p.features;
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[d][i] = inside ? load_words<uint4>(x[i] + col) : uint4{0, 0, 0, 0};
      if (More::kRides || !mask.drops()) continue;
      DropoutMask::EightColumns columns(col + 8 * at.q);
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[d][i] = mask.kept(rows[d][i], keys[i], columns);
    }
    const T* weight = p.down + step * kStep + 8 * at.q;
    auto load = [&](int tile, int d) {
      // The lanes behind the last column take that one; their sums are not used.
      int col = col0 + 8 * tile + at.g;
      int64_t row = col < cols ? col : cols - 1;
      bool inside = (step + d * kTeamShares) * kStep + 8 * at.q < p.features;
      return inside ? load_piece_at(weight + d * kTeamShares * kStep, row * row_bytes) : uint4{0, 0, 0, 0};
    };
    uint4 ahead[kDepth];  // what is multiplied next, asked for with what rides
    if constexpr (More::kRides) {
      more.load(step * kStep + 8 * at.q);
#pragma unroll
      for (int d = 0; d < kDepth; ++d) ahead[d] = load(0, d);
      more.multiply(rows);
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (!mask.drops()) continue;
        DropoutMask::EightColumns columns((step + d * kTeamShares) * kStep + 8 * at.q);
#pragma unroll
        for (int i = 0; i < 2; ++i) rows[d][i] = mask.kept(rows[d][i], keys[i], columns);
      }
    }
#pragma unroll
    for (int tile = 0; tile < Team::kTiles; ++tile) {
      if (tile >= tiles) break;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        uint4 b = More::kRides && tile == 0 ? ahead[d] : load(tile, d);
        multiply_step<T>(sums[tile], rows[d][0], rows[d][1], b);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* to = team.sums + (share * kTeamRows + at.row(first + i)) * Team::kPitch + 2 * at.q;
#pragma unroll
    for (int tile = 0; tile < Team::kTiles; ++tile) {
      store_words(to + 8 * tile, FloatPair{sums[tile][2 * i], sums[tile][2 * i + 1]});
    }
    if constexpr (More::kRides) more.store(to + kChunkRanks, i);
  }
}

// t of narrow columns from col0 on = the warps' sums, added in their order, and the bias: to team.t and to the slots.
template <typename T, typename Team>
ADAMIX_DEVICE void add_down(const GatedForward<T>& p, const Team& team, const LaneRows& at, int col0, int cols) {
  constexpr int kPitch = Team::kPitch;
  const SlotExperts& side = p.gates.down;
  int ranks = p.ranks(), slots = side.slots, col = col0 + 2 * at.lane;
  float scale = p.dropout.seed == nullptr ? 1.f : p.dropout.scale;
  if (col >= cols) return;
  int expert = static_cast<int>(p.by_ranks.quotient(col));
  FloatPair bias{0.f, 0.f};
  if (p.down_bias != nullptr) {
    uint32_t word = load_words<uint32_t>(p.down_bias + col);
    bias = {low_of<T>(word), high_of<T>(word)};
  }
  for (int row = at.warp; row < at.count; row += kTeamWarps) {
    const float* from = team.sums + row * kPitch + 2 * at.lane;
    FloatPair sum{0.f, 0.f};
#pragma unroll
    for (int of = 0; of < kTeamShares; ++of) {
      FloatPair part = load_words<FloatPair>(from + of * kTeamRows * kPitch);
      sum = {sum.low + part.low, sum.high + part.high};
    }
    uint32_t word = word_of<T>(sum.low * scale + bias.low, sum.high * scale + bias.high);
    team.t.store(row, col, word);
    T* to = p.t + (at.first + row) * slots * ranks;
    if (!team.table.served[row]) continue;
    if (!side.differ()) {
      store_words(to + col, word);
      continue;
    }
    team.table.each(side, team.table.down, row, expert,
                    [&](int, int slot) { store_words(to + slot * ranks + col - expert * ranks, word); });
  }
}

// The rows of wrong ids: NaN in what is saved of them.
template <typename T>
ADAMIX_DEVICE void poison_team(const SlotTable<T>& table, const LaneRows& at, T* rows, int cols) {
  for (int row = at.warp; row < at.count; row += kTeamWarps) {
    if (table.served[row]) continue;
    for (int col = at.lane; col < cols; col += 32) rows[(at.first + row) * cols + col] = from_float<T>(not_a_number());
  }
}

// What the second product takes, of all the team's rows: gates times t to team.narrow.
template <typename T, typename Team>
ADAMIX_DEVICE void mix_team(const GatedForward<T>& p, const Team& team, const LaneRows& at) {
  const SlotExperts& up = p.gates.up;
  int ranks = p.ranks(), inner = up.experts * p.rank;
  for (int row = at.warp; row < at.count; row += kTeamWarps) {
    if (!team.table.served[row]) continue;
    T* to = team.narrow.data + row * team.narrow.pitch;
    for (int col = 2 * at.lane; col < up.experts * ranks; col += 64) {
      int expert = static_cast<int>(p.by_ranks.quotient(col)), i = col - expert * ranks;
      int group = static_cast<int>(p.by_rank.quotient(i));
      FloatPair own = mixed_pair(p, team.table, team.t, row, expert, i);
      store_words(to + group * team.narrow.group_pitch + expert * p.rank + i - group * p.rank,
                  word_of<T>(own.low, own.high));
    }
    for (int expert = at.lane; p.up_bias != nullptr && expert < up.experts; expert += 32) {
      to[round_up(inner, 16) + expert] = from_float<T>(bias_gate(p, team.table, row, expert));
    }
  }
}

// out = base + what is mixed times B^T, and the gaps between the groups.
template <typename T, typename Team>
ADAMIX_DEVICE void multiply_up(const GatedForward<T>& p, const Team& team, const LaneRows& at) {
  const SlotExperts& up = p.gates.up;
  int inner = up.experts * p.rank;
  int cols = p.ranges.cols, steps = ceil_div(p.up_bias == nullptr ? inner : up_cols(p), 16);
  int64_t expert_size = static_cast<int64_t>(p.ranges.groups) * cols * p.rank;
  OutColumns of{0, 0};
  for (of.advance(at.warp * kStep, cols); of.group < p.ranges.groups; of.advance(kTeamWarps * kStep, cols)) {
    bool inside = of.col + 8 * at.q < cols;
    int start = p.ranges.start[of.group] + of.col + 8 * at.q;
    uint4 old[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool wanted = p.base.data != nullptr && inside;
      old[i] = wanted ? load_words<uint4>(p.base.data + p.base.offset(at.number(i)) + start) : uint4{0, 0, 0, 0};
    }
    int first = of.col + 4 * at.g < cols ? of.col + 4 * at.g : 0;  // of the lane's four columns of the factor
    const T* weight = p.up + (static_cast<int64_t>(of.group) * cols + first) * p.rank;
    float wide[2][4][4] = {};
    auto load = [&](int k, uint2(&b)[4]) {
      int from = 16 * k + 4 * at.q;
      if (16 * k >= inner) {  // biases
        from -= round_up(inner, 16);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float of_bias[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            bool there = from + e < up.experts;
            of_bias[e] = there ? to_float(p.up_bias[static_cast<int64_t>(from + e) * cols + first + n]) : 0.f;
          }
          b[n] = uint2{word_of<T>(of_bias[0], of_bias[1]), word_of<T>(of_bias[2], of_bias[3])};
        }
        return;
      }
      int expert = static_cast<int>(p.by_rank.quotient(from));
      const T* own = weight + expert * expert_size + from - expert * p.rank;
#pragma unroll
      for (int n = 0; n < 4; ++n) b[n] = from < inner ? load_words<uint2>(own + n * p.rank) : uint2{0, 0};
    };
    auto expert_of = [&](int k, int, int only, uint2 b) {
      int from = 16 * k + 4 * at.q;
      if (16 * k >= inner) {
        from = only - (from - round_up(inner, 16));  // which of the four experts
        return uint2{from == 0   ? b.x & 0xffffu
                     : from == 1 ? b.x & 0xffff0000u
                                 : 0u,
                     from == 2   ? b.y & 0xffffu
                     : from == 3 ? b.y & 0xffff0000u
                                 : 0u};
      }
      return static_cast<int>(p.by_rank.quotient(from)) == only ? b : uint2{0, 0};
    };
    multiply_wide<T>(
        wide, steps, up.differ(), up.experts,
        [&](int half, int k, uint2& upper, uint2& lower) {
          team.narrow.load(at, half, of.group * team.narrow.group_pitch + 16 * k, upper, lower);
        },
        load, expert_of,
        [&](int i, int expert) {
          bool named = false;
          for (int slot = 0; slot < p.gates.slots; ++slot) {
            named = named || team.table.up[at.row(i) * p.gates.slots + slot] == expert;
          }
          return named;
        });
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& sums = wide[i / 2];
      int lower = i % 2;
      // The lane's columns 0 to 3 are its first of each product, 4 to 7 its second.
      auto pair = [&](uint32_t of_base, int n, int e) {
        return word_of<T>(low_of<T>(of_base) + sums[n][2 * lower + e],
                          high_of<T>(of_base) + sums[n + 1][2 * lower + e]);
      };
      uint4 piece{pair(old[i].x, 0, 0), pair(old[i].y, 2, 0), pair(old[i].z, 0, 1), pair(old[i].w, 2, 1)};
      if (!inside || at.row(i) >= at.count) continue;
      uint32_t lost = word_of<T>(not_a_number(), not_a_number());
      if (!team.table.served[at.row(i)]) piece = {lost, lost, lost, lost};
      store_piece_at(p.out + (at.first + at.row(i)) * p.width + start, 0, piece);
    }
  }
  for (int gap = 0; gap < p.ranges.gaps; ++gap) {
    copy_gap(at, p.base, p.out, p.width, p.ranges.gap_start[gap], p.ranges.gap_cols[gap]);
  }
}

}  // namespace adamix
