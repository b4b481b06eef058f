// Pairs of a row and a slot in the order of their expert, which both sides name alike: a tile of them has one expert,
// whatever number there is. A pair's wide result stands in memory, and a row's are summed in the order of its slots.
#pragma once

#include "common/planes.h"
#include "gated/gated.h"
#include "routed_lora/lora_team.h"

namespace adamix {

// Pairs by expert, those of ids outside the bank last. Each expert's begin at a multiple of kTeamRows, and -1 stands
// between its last and the next one's first.
struct PairOrder {
  const int* at;     // [size]
  const int* edges;  // [experts, 2]: where an expert's pairs begin and end
  Divisor by_slots;

  static ADAMIX_BOTH int64_t size(int64_t pairs, int64_t experts) {
    return (pairs + kTeamRows - 1) / kTeamRows * kTeamRows + kTeamRows * (experts + 1);
  }
};

struct PairSort {
  Gates gates;
  int *at, *edges;
  Divisor by_slots;
  int pairs;
};

template <typename T>
struct SortedForward : GatedBanks<T> {
  PairOrder order;
  Rows<const T> x;  // [B, S, K]
  T* t;             // [N, slots, groups * r], before the activation
  T* y;             // [N, slots, groups * Ng], the pairs' results
};

template <typename T>
struct SortedInputGrad : GatedBanks<T> {
  PairOrder order;
  Rows<const T> grad_out;  // [B, S, N]
  const T* t;
  T* dt;          // [N, slots, groups * r], the gradient of t; 0 in a row of a wrong id; or null
  T* mixed;       // the same of what B is multiplied by, or null
  T* bias_gates;  // [N, slots], the same of what the biases up are multiplied by, or null
  void* dgates;   // [N, slots], or null
  Kind dgates_kind;
  T* dx;         // [N, slots, K], or null
  bool gathers;  // whether grad_out B is wanted
};

// out = base + the sum of a row's pairs' results.
template <typename T>
struct PairSum {
  const T* y;  // [N, slots, groups * Ng]
  Rows<const T> base;
  T* out;  // [N, width]
  ColumnRanges ranges;
  int64_t rows;
  int slots, width;
};

template <typename T>
struct SortedSide {
  Rows<const T> wide;  // from the first column of a group on
  const T* narrow;     // [N, slots, groups * ranks]; null: nothing is wanted
  T* weight;           // [experts, groups * ranks, cols] if ranks_first, else [experts, groups * cols, ranks]
  T* bias;             // [experts, ranks] if ranks_first, else [experts, cols], or null
  int groups, cols, ranks;
  bool ranks_first;
};

template <typename T>
struct SortedWeightGrad {
  SortedSide<T> down, up;
  const T* bias_gates;  // where up has a bias
  PairOrder order;
  ColumnRanges ranges;
  Dropout dropout;
  int experts;
};

// What a lane of a tile knows: a tile is a team's rows, each a pair.
template <typename T>
struct PairRows : LaneRows {
  int own;     // the pair of row `lane`, -1 where there is none
  int top;     // that of row 0, which there is
  int expert;  // theirs; kNoExpert of an id outside the bank
  const PairOrder& order;

  // top: as read, not below 0. All lanes call.
  ADAMIX_DEVICE PairRows(const GatedBanks<T>& p, const PairOrder& of, int first_pair)
      : LaneRows(static_cast<int64_t>(gridDim.x) * kTeamRows), own(of.at[first + lane]), top(first_pair), order(of) {
    count = __popc(__ballot_sync(0xffffffffu, own >= 0));
    int row = row_of(top);
    expert = p.gates.up.named(p.gates.at(row) + top - row * p.gates.slots, 0);
  }
  ADAMIX_DEVICE int row_of(int pair) const { return static_cast<int>(order.by_slots.quotient(pair)); }
  // Of row i of the team; the first one's for one behind the last. All lanes call.
  ADAMIX_DEVICE int pair(int i) const {
    int found = shuffle_from(own, i);
    return found < 0 ? top : found;
  }
};

// Of the tile's pairs, in shared memory.
struct PairTable {
  int* pair;               // as above
  float *weights, *scale;  // gate times scale, and scale: 1 unless the op has some
  int* served;             // whether all ids of the pair's row are right

  template <typename Memory>
  ADAMIX_BOTH explicit PairTable(Memory& memory)
      : pair(memory.template take<int>(kTeamRows)),
        weights(memory.template take<float>(kTeamRows)),
        scale(memory.template take<float>(kTeamRows)),
        served(memory.template take<int>(kTeamRows)) {}

  // All threads call; complete after a barrier.
  template <typename T>
  ADAMIX_DEVICE void fill(const GatedBanks<T>& p, const PairRows<T>& at) const {
    if (at.warp > 0) return;
    int found = at.own < 0 ? at.top : at.own, row = at.row_of(found), slot = found - row * p.gates.slots;
    int64_t from = p.gates.at(row);
    bool good = p.gates.served(from);
    float factor = good ? p.gates.scale(from, slot) : not_a_number();
    pair[at.lane] = found, served[at.lane] = good;
    scale[at.lane] = factor, weights[at.lane] = factor * p.gates.gate(from, slot);
  }
};

#if defined(ADAMIX_LAUNCHERS)
void launch_gated_sort(const PairSort& params, int experts, const Device& device);

template <typename T>
void launch_sorted_forward(const SortedForward<T>& params, int64_t tiles, const Device& device);

template <typename T>
void launch_sorted_input_grad(const SortedInputGrad<T>& params, int64_t tiles, const Device& device);

template <typename T>
void launch_sorted_weight_grad(const SortedWeightGrad<T>& params, const Device& device);

template <typename T>
void launch_pair_sum(const PairSum<T>& params, const Device& device);
#endif

}  // namespace adamix
