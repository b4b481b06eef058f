// Eight warps and the 32 rows they serve, where each row is 16-byte pieces and 16-bit numbers are multiplied in
// registers: all experts' narrow columns side by side, what is not named being zero in what multiplies the wide ones.
#pragma once

#include "gated/gated.h"
#include "routed_lora/lora_team.h"

namespace adamix {

constexpr int kMostRanks = 256;              // of all experts
constexpr int kMostBiases = 16;              // experts with a bias up
constexpr int kTeamShares = kTeamWarps / 2;  // of the first product's inner dimension

// What the slots of the team's rows name and weigh.
template <typename T>
struct SlotTable {
  float *gate, *scale;  // [kTeamRows, slots]
  int *down, *up;       // the same, of experts; -1: none there is
  int* served;          // [kTeamRows]
  int slots;

  template <typename Memory>
  ADAMIX_BOTH SlotTable(Memory& memory, const Gates& gates)
      : gate(memory.template take<float>(kTeamRows * max_of(gates.slots, 1))),
        scale(memory.template take<float>(kTeamRows * max_of(gates.slots, 1))),
        down(memory.template take<int>(kTeamRows * max_of(gates.slots, 1))),
        up(memory.template take<int>(kTeamRows * max_of(gates.slots, 1))),
        served(memory.template take<int>(kTeamRows)),
        slots(gates.slots) {}

  // All threads call; complete after a barrier.
  ADAMIX_DEVICE void fill(const Gates& gates, const LaneRows& at) const {
    fill(gates, at.first, at.count, at.thread(), kTeamThreads);
  }
  // Of `count` rows from `first` on, by so many threads.
  ADAMIX_DEVICE void fill(const Gates& gates, int64_t first, int count, int thread, int threads) const {
    for (int i = thread; i < kTeamRows * slots; i += threads) {
      int row = i / slots, slot = i - row * slots;
      float weight = 0.f, factor = 0.f;
      int a = -1, b = -1;
      if (row < count) {
        int64_t from = gates.at(static_cast<int>(first) + row);
        int of_down = gates.down.named(from + slot, slot), of_up = gates.up.named(from + slot, slot);
        if (of_down != kNoExpert && of_up != kNoExpert) {
          a = of_down, b = of_up;
          weight = gates.gate(from, slot), factor = gates.scale(from, slot);
        }
      }
      gate[i] = weight, scale[i] = factor, down[i] = a, up[i] = b;
    }
    if (thread < kTeamRows) {
      served[thread] = thread < count && gates.served(gates.at(static_cast<int>(first) + thread));
    }
  }
  // Calls visit(slot number in the table, slot) for the slots of a row that name an expert of up; all, of one.
  template <typename Visit>
  ADAMIX_DEVICE void each(const SlotExperts& side, const int* named, int row, int expert, Visit visit) const {
    bool direct = !side.differ() && side.experts > 1;
    int from = direct ? expert : 0, to = direct ? expert + 1 : slots;
#pragma unroll 1
    for (int slot = from; slot < to; ++slot) {
      int at = row * slots + slot;
      if (!side.differ() || named[at] == expert) visit(at, slot);
    }
  }
};

// The narrow values of the team's rows, all experts of down side by side.
template <typename T>
struct TeamValues {
  T* data;
  int pitch;

  template <typename Memory>
  ADAMIX_BOTH TeamValues(Memory& memory, int cols) : pitch(round_up(cols, 8) + 8) {
    data = memory.template take<T>(kTeamRows * pitch);
  }
  ADAMIX_DEVICE FloatPair pair(int row, int col) const {
    uint32_t word = load_words<uint32_t>(data + row * pitch + col);
    return {low_of<T>(word), high_of<T>(word)};
  }
  ADAMIX_DEVICE void store(int row, int col, uint32_t word) const { store_words(data + row * pitch + col, word); }
};

template <typename T>
ADAMIX_DEVICE FloatPair activate_pair(Activation kind, FloatPair of) {
  return {activate(kind, of.low), activate(kind, of.high)};
}

// Of two neighbouring ranks, where gates weigh weights: the gated sum of t, before the activation.
template <typename T>
ADAMIX_DEVICE FloatPair mean_pair(const GatedBanks<T>& p, const SlotTable<T>& table, const TeamValues<T>& t, int row,
                                  int i) {
  FloatPair sum{0.f, 0.f};
#pragma unroll 1
  for (int slot = 0; slot < table.slots; ++slot) {
    int at = row * table.slots + slot;
    float gain = p.gates.up.experts == 1 ? table.gate[at] * table.scale[at] : table.gate[at];
    FloatPair own = t.pair(row, table.down[at] * p.ranks() + i);
    sum = {sum.low + gain * own.low, sum.high + gain * own.high};
  }
  return sum;
}

// What ranks i and i + 1 of an expert of up are multiplied by; 0 where no slot names it.
template <typename T>
ADAMIX_DEVICE FloatPair mixed_pair(const GatedBanks<T>& p, const SlotTable<T>& table, const TeamValues<T>& t, int row,
                                   int expert, int i) {
  const Gates& gates = p.gates;
  FloatPair sum{0.f, 0.f}, mean{0.f, 0.f};
  if (gates.weights) {
    mean = activate_pair<T>(p.activation, mean_pair(p, table, t, row, i));
    if (gates.up.experts == 1) return mean;
  }
  table.each(gates.up, table.up, row, expert, [&](int at, int) {
    float factor = table.gate[at] * table.scale[at];
    FloatPair own = gates.weights ? mean : activate_pair<T>(p.activation, t.pair(row, table.down[at] * p.ranks() + i));
    sum = {sum.low + factor * own.low, sum.high + factor * own.high};
  });
  return sum;
}

// What an expert's bias up is multiplied by.
template <typename T>
ADAMIX_DEVICE float bias_gate(const GatedBanks<T>& p, const SlotTable<T>& table, int row, int expert) {
  if (p.gates.weights && p.gates.up.experts == 1) return 1.f;
  float sum = 0.f;
  table.each(p.gates.up, table.up, row, expert, [&](int at, int) { sum += table.gate[at]; });
  return sum;
}

// wide = [32 rows, 32 columns] of a warp: rows of `half` and products n. load(k, b): the right operand's words of inner
// indices from 16 k on. Where rows name experts of their own and a sum is not finite: once more, expert by expert, each
// row taking those it names. expert_of(k): of the lane's four inner indices; load_left(half, k, upper, lower).
template <typename T, typename LoadLeft, typename Load, typename ExpertOf, typename Names>
ADAMIX_DEVICE void multiply_wide(float (&wide)[2][4][4], int steps, bool differ, int experts, LoadLeft load_left,
                                 Load load, ExpertOf expert_of, Names names) {
  auto product = [&](float (&sums)[2][4][4], int only) {
#pragma unroll 1
    for (int k = 0; k < steps; ++k) {
      uint2 b[4];
      load(k, b);
      if (only >= 0) {
        // The lane's indices of a product's second operand are of one expert before it is turned.
#pragma unroll
        for (int n = 0; n < 4; ++n) b[n] = expert_of(k, n, only, b[n]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint2 upper, lower;
        load_left(half, k, upper, lower);
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply<T>(sums[half][n], upper.x, lower.x, upper.y, lower.y, b[n].x, b[n].y);
      }
    }
  };
  product(wide, -1);
  if (!differ) return;
  float all = 0.f;
#pragma unroll
  for (int e = 0; e < 32; ++e) all += wide[e / 16][e / 4 % 4][e % 4];
  if (!__any_sync(0xffffffffu, !(all - all == 0.f))) return;
#pragma unroll
  for (int e = 0; e < 32; ++e) wide[e / 16][e / 4 % 4][e % 4] = 0.f;
  for (int expert = 0; expert < experts; ++expert) {
    float own[2][4][4] = {};
    product(own, expert);
#pragma unroll
    for (int e = 0; e < 32; ++e) {
      if (names(2 * (e / 16) + e % 4 / 2, expert)) wide[e / 16][e / 4 % 4][e % 4] += own[e / 16][e / 4 % 4][e % 4];
    }
  }
}

#if defined(ADAMIX_LAUNCHERS)
// Of calls that the team serves, those where one expert up serves all: a tile of rows stays in registers. Launches
// nothing and returns false for others.
template <typename T>
bool launch_gated_resident_forward(const GatedForward<T>& params, const Device& device);

// Whether the team serves a call of this kind at all: pieces, sizes, the device's products.
template <typename T>
bool team_fits(const GatedBanks<T>& p, bool biased, const Device& device) {
  const Gates& gates = p.gates;
  bool fits = device.capability >= kFragmentsFrom<T> && p.rank > 0 && p.rank % 4 == 0 && p.features > 0 &&
              p.features % 8 == 0 && p.ranges.cols > 0 && p.ranges.cols % 8 == 0 && p.down_aligned &&
              reinterpret_cast<uintptr_t>(p.up) % 8 == 0 && gates.slots > 0;
  for (int group = 0; group < p.ranges.groups; ++group) fits = fits && p.ranges.start[group] % 8 == 0;
  fits = fits && gates.down.experts * p.ranks() <= kMostRanks && gates.up.experts * p.ranks() <= kMostRanks;
  fits = fits && (!biased || (gates.up.experts <= kMostBiases && p.ranges.groups == 1));
  return fits && (p.down_bias == nullptr || reinterpret_cast<uintptr_t>(p.down_bias) % 4 == 0);
}
#endif

}  // namespace adamix
