// Between the backward's two products, of the 32 rows of a team: the gradients of gates and of what is narrow, and what
// the weights' gradients take.
#pragma once

#include "gated/gated_team.h"

namespace adamix {

struct Activated {
  float value, slope;
};

// activate and activation_slope at once.
ADAMIX_DEVICE Activated activate_with_slope(Activation kind, float z) {
  if (kind != Activation::kGelu) return {activate(kind, z), activation_slope(kind, z)};
  float below = 0.5f * (1.f + erff(z * kSqrtHalf));
  return {z * below, below + z * kInvSqrt2Pi * expf(-0.5f * z * z)};
}

template <typename T>
struct GatedGradTeam {
  static constexpr int kTiles = kChunkRanks / 16;
  static constexpr int kPitch = 16 * (kTiles | 1);  // an odd number of 64 bytes: no bank twice

  float* sums;         // [kTeamShares, kTeamRows, kPitch]
  float* bias_sums;    // [kTeamShares, kTeamRows, kMostBiases]: grad_out times the biases up
  TeamValues<T> t, u;  // all experts of down; of up, each with its groups' ranks
  NarrowRows<T> dt;    // all experts of down
  float* mean;         // [kTeamRows, ranks, 2], where gates weigh weights: activated, and the gradient before that
  SlotTable<T> table;

  template <typename Memory>
  ADAMIX_BOTH GatedGradTeam(Memory& memory, const GatedInputGrad<T>& p)
      : sums(memory.template take<float>(kTeamShares * kTeamRows * kPitch)),
        bias_sums(memory.template take<float>(p.up_bias == nullptr ? 1 : kTeamShares * kTeamRows * kMostBiases)),
        t(memory, p.gates.down.experts * p.ranks()),
        u(memory, p.gates.up.experts * p.ranks()),
        dt(memory, 1, p.gates.down.experts * p.ranks(), 1, 0),
        mean(memory.template take<float>(p.gates.weights ? 2 * kTeamRows * p.ranks() : 1)),
        table(memory, p.gates) {}
};

// Where ranks i and i + 1 of an expert of up are left for the weights' gradients.
template <typename T>
ADAMIX_DEVICE T* place_of_mixed(const GatedInputGrad<T>& p, int64_t row, int expert, int i) {
  int group = static_cast<int>(p.by_rank.quotient(i));
  return p.mixed + row * p.mixed_pitch + (group * p.gates.up.experts + expert) * p.rank + i - group * p.rank;
}

// t of a row, all experts of down side by side; what no slot names is not set.
template <typename T>
ADAMIX_DEVICE void load_t(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, const LaneRows& at, int row) {
  const SlotExperts& side = p.gates.down;
  int ranks = p.ranks(), width = side.slots * ranks;
  const T* from = p.t + (at.first + row) * width;
  for (int col = 2 * at.lane; col < width; col += 64) {
    int slot = static_cast<int>(p.by_ranks.quotient(col)), expert = slot;
    if (side.differ()) {
      const int* named = team.table.down + row * p.gates.slots;
      expert = named[slot];
      // Of two slots of one expert, which hold the same, the first stores.
      for (int before = 0; before < slot; ++before) expert = named[before] == expert ? -1 : expert;
    }
    if (expert >= 0) team.t.store(row, expert * ranks + col - slot * ranks, load_words<uint32_t>(from + col));
  }
}

// Of a slot's gate: grad_out times its bias up.
template <typename T>
ADAMIX_DEVICE float grad_of_bias(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, int row, int slot) {
  float sum = 0.f;
#pragma unroll
  for (int of = 0; of < kTeamShares; ++of) {
    sum += team.bias_sums[(of * kTeamRows + row) * kMostBiases + team.table.up[row * p.gates.slots + slot]];
  }
  return sum;
}

// The gates' gradient of a row: of each slot a lane, in the ranks' order.
template <typename T>
ADAMIX_DEVICE void grad_gates(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, const LaneRows& at, int row) {
  const Gates& gates = p.gates;
  int ranks = p.ranks(), slots = gates.slots;
  bool up_one = gates.up.experts == 1;
  for (int slot = at.lane; slot < slots; slot += 32) {
    int i = row * slots + slot;
    float sum = not_a_number(), scale = team.table.scale[i];
    if (team.table.served[row]) {
      int down = team.table.down[i] * ranks, up = team.table.up[i] * ranks;
      const float* mean = team.mean + row * ranks * 2;
      float of_down = 0.f;
      sum = 0.f;
      for (int rank = 0; rank < ranks; rank += 2) {
        FloatPair t = team.t.pair(row, down + rank), u = team.u.pair(row, up + rank), h;
        if (gates.weights) {
          of_down += mean[2 * rank + 1] * t.low;
          of_down += mean[2 * rank + 3] * t.high;
          h = {mean[2 * rank], mean[2 * rank + 2]};
        } else {
          h = activate_pair<T>(p.activation, t);
        }
        sum += h.low * u.low;
        sum += h.high * u.high;
      }
      sum *= scale;
      if (gates.weights) sum = up_one ? scale * of_down : sum + of_down;
      if (p.up_bias != nullptr && !(gates.weights && up_one)) sum += grad_of_bias(p, team, row, slot);
    }
    store_scalar(p.dgates, p.dgates_kind, (at.first + row) * slots + slot, sum);
  }
}

// Where gates weigh weights: the gated sum of t, activated, and the gradient it gets before that.
template <typename T>
ADAMIX_DEVICE void grad_mean(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, const LaneRows& at, int row) {
  int ranks = p.ranks();
  for (int i = 2 * at.lane; i < ranks; i += 64) {
    FloatPair before = mean_pair<T>(p, team.table, team.t, row, i), behind{0.f, 0.f};
    if (p.gates.up.experts == 1) {
      behind = team.u.pair(row, i);
    } else {
#pragma unroll 1
      for (int slot = 0; slot < p.gates.slots; ++slot) {
        int of = row * p.gates.slots + slot;
        float factor = team.table.gate[of] * team.table.scale[of];
        FloatPair u = team.u.pair(row, team.table.up[of] * ranks + i);
        behind = {behind.low + factor * u.low, behind.high + factor * u.high};
      }
    }
    float* to = team.mean + (row * ranks + i) * 2;
    Activated low = activate_with_slope(p.activation, before.low),
              high = activate_with_slope(p.activation, before.high);
    to[0] = low.value, to[1] = behind.low * low.slope;
    to[2] = high.value, to[3] = behind.high * high.slope;
  }
}

// The gradient of ranks i and i + 1 of an expert of down; 0 where no slot names it.
template <typename T>
ADAMIX_DEVICE FloatPair dt_pair(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, int row, int expert, int i) {
  const Gates& gates = p.gates;
  int ranks = p.ranks();
  FloatPair sum{0.f, 0.f};
  const float* mean = team.mean + (row * ranks + i) * 2;
  team.table.each(gates.down, team.table.down, row, expert, [&](int at, int) {
    float gate = team.table.gate[at], scale = team.table.scale[at];
    if (gates.weights) {
      float gain = gates.up.experts == 1 ? gate * scale : gate;
      sum = {sum.low + gain * mean[1], sum.high + gain * mean[3]};
      return;
    }
    FloatPair u = team.u.pair(row, team.table.up[at] * ranks + i);
    sum = {sum.low + gate * scale * u.low, sum.high + gate * scale * u.high};
  });
  if (gates.weights || p.activation == Activation::kNone) return sum;
  FloatPair t = team.t.pair(row, expert * ranks + i);
  bool named = !gates.down.differ() || sum.low != 0.f || sum.high != 0.f;  // what no slot names is not set
  if (!named) return sum;
  return {sum.low * activation_slope(p.activation, t.low), sum.high * activation_slope(p.activation, t.high)};
}

// What ranks i and i + 1 of an expert of up are multiplied by.
template <typename T>
ADAMIX_DEVICE FloatPair mixed_of(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, int row, int expert, int i) {
  if (!p.gates.weights || !p.gathers) return mixed_pair<T>(p, team.table, team.t, row, expert, i);
  const float* mean = team.mean + (row * p.ranks() + i) * 2;
  if (p.gates.up.experts == 1) return {mean[0], mean[2]};
  float factor = 0.f;
  team.table.each(p.gates.up, team.table.up, row, expert,
                  [&](int at, int) { factor += team.table.gate[at] * team.table.scale[at]; });
  return {factor * mean[0], factor * mean[2]};
}

// What the products of the weights' gradients take, of a row: dt, and mixed, one group after another.
template <typename T>
ADAMIX_DEVICE void leave_narrow(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, const LaneRows& at, int row) {
  const Gates& gates = p.gates;
  int ranks = p.ranks(), down_cols = gates.down.experts * ranks, up_cols = gates.up.experts * ranks;
  bool served = team.table.served[row] != 0;
  int64_t number = at.first + row;
  for (int col = 2 * at.lane; p.gathers && col < down_cols; col += 64) {
    int expert = static_cast<int>(p.by_ranks.quotient(col));
    FloatPair own{0.f, 0.f};
    if (served) own = dt_pair(p, team, row, expert, col - expert * ranks);
    uint32_t word = word_of<T>(own.low, own.high);
    store_words(team.dt.data + row * team.dt.pitch + col, word);
    if (p.dt != nullptr) store_words(p.dt + number * down_cols + col, word);
  }
  if (p.mixed == nullptr) return;
  for (int col = 2 * at.lane; col < up_cols; col += 64) {
    int expert = static_cast<int>(p.by_ranks.quotient(col)), i = col - expert * ranks;
    FloatPair own{0.f, 0.f};
    if (served) own = mixed_of<T>(p, team, row, expert, i);
    store_words(place_of_mixed(p, number, expert, i), word_of<T>(own.low, own.high));
  }
}

// One row, where all warps' sums are there. All lanes call.
template <typename T>
ADAMIX_DEVICE void unmix_row(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, const LaneRows& at, int row) {
  load_t(p, team, at, row);
  __syncwarp();
  if (p.gates.weights && p.gathers && team.table.served[row]) {
    grad_mean(p, team, at, row);
    __syncwarp();
  }
  if (p.dgates != nullptr) grad_gates(p, team, at, row);
  leave_narrow(p, team, at, row);
}

}  // namespace adamix
