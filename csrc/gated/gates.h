// Gates: every row has slots, and each slot names one expert of either side and weighs it.
#pragma once

#include "common/rows.h"
#include "common/scalar.h"

namespace adamix {

// One side's experts, down (A) or up (B): a slot names that of its id, or slot e expert e, or the one there is.
struct SlotExperts {
  const void* ids;  // int32 or int64, as many as gates
  bool chosen;      // whether there are ids
  bool wide;        // int64
  int experts;      // in the bank
  int slots;        // of what is narrow on this side: 1 for a bank of one, else those of the gates

  // at: of the slot among all gates. kNoExpert for an id outside the bank.
  ADAMIX_DEVICE int named(int64_t at, int slot) const {
    if (!chosen) return experts == 1 ? 0 : slot;
    uint64_t id = wide ? static_cast<const uint64_t*>(ids)[at]
                       : static_cast<uint64_t>(static_cast<int64_t>(static_cast<const int32_t*>(ids)[at]));
    return id < static_cast<uint64_t>(experts) ? static_cast<int>(id) : kNoExpert;
  }
  // Rows have experts of their own: not all of a tile's rows have all.
  ADAMIX_BOTH bool differ() const { return chosen && experts > 1; }
};

struct Gates {
  const void* values;  // [rows / rows_per_gate, slots]
  Kind kind;
  SlotExperts down, up;
  const float* scales;  // of the experts of up, or of down where up is a bank of one; null: all 1
  Divisor rows_per_gate;
  int slots;
  float scaling;
  bool weights;  // gates weigh the experts of down before the activation, and those of up behind it

  // The first of a row's slots among all gates.
  ADAMIX_DEVICE int64_t at(int row) const { return static_cast<int64_t>(rows_per_gate.quotient(row)) * slots; }
  ADAMIX_DEVICE float gate(int64_t at, int slot) const { return load_scalar<float>(values, kind, at + slot); }
  ADAMIX_DEVICE float scale(int64_t at, int slot) const {
    if (scales == nullptr) return scaling;
    return scaling * scales[(up.experts > 1 ? up : down).named(at + slot, slot)];
  }
  // Where gates weigh weights: what weighs a slot's expert of down is gate() times this.
  ADAMIX_DEVICE float down_scale(int64_t at, int slot) const { return up.experts == 1 ? scale(at, slot) : 1.f; }
  // Whether all slots of a row name experts there are.
  ADAMIX_DEVICE bool served(int64_t at) const {
    bool all = true;
    for (int slot = 0; slot < slots; ++slot) {
      all = all && down.named(at + slot, slot) != kNoExpert && up.named(at + slot, slot) != kNoExpert;
    }
    return all;
  }
};

}  // namespace adamix
