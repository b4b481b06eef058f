// Between the backward's two products, of the 32 rows of a team, slot by slot: a lane has two ranks of a slot and takes
// their activation once for all that comes of it. Where a slot's ranks are a power of two.
#pragma once

#include "gated/gated_unmix.h"

namespace adamix {

template <typename T>
ADAMIX_DEVICE bool unmixes_by_slots(const GatedInputGrad<T>& p) {
  int ranks = p.ranks();
  return ranks <= 64 && (ranks & (ranks - 1)) == 0;
}

// Sums of what lanes `distance`, 2 distance, ... below `end` apart hold. All lanes call.
ADAMIX_DEVICE float sum_apart(float of, int distance, int end) {
#pragma unroll 1
  for (; distance < end; distance *= 2) of += shuffle_xor(of, distance);
  return of;
}
ADAMIX_DEVICE FloatPair sum_apart(FloatPair of, int distance, int end) {
  return {sum_apart(of.low, distance, end), sum_apart(of.high, distance, end)};
}

// Whether two slots of a row name one expert of several. All lanes call.
template <typename T>
ADAMIX_DEVICE bool names_one_twice(const Gates& gates, const SlotTable<T>& table, const LaneRows& at, int row) {
  bool twice = false;
  int from = row * gates.slots;
#pragma unroll 1
  for (int slot = at.lane; slot < gates.slots; slot += 32) {
#pragma unroll 1
    for (int other = 0; other < slot; ++other) {
      twice = twice || (gates.down.differ() && table.down[from + other] == table.down[from + slot]);
      twice = twice || (gates.up.differ() && table.up[from + other] == table.up[from + slot]);
    }
  }
  return __any_sync(0xffffffffu, twice) != 0;
}

// As unmix_row, of a row whose slots name experts of their own on a side of several. All lanes call.
template <typename T>
ADAMIX_DEVICE void unmix_slots(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, const LaneRows& at, int row) {
  const Gates& gates = p.gates;
  const SlotTable<T>& table = team.table;
  int ranks = p.ranks(), width = gates.slots * ranks, down_cols = gates.down.experts * ranks;
  bool down_one = gates.down.experts == 1, up_one = gates.up.experts == 1;
  int64_t number = at.first + row;
  const T* from = p.t + number * (down_one ? ranks : width);
  T *own_dt = team.dt.data + row * team.dt.pitch, *dt = p.dt == nullptr ? nullptr : p.dt + number * down_cols;
  // What no slot names.
  for (int col = 4 * at.lane; dt != nullptr && gates.down.differ() && col < down_cols; col += 128) {
    store_words(dt + col, uint2{0, 0});
  }
  for (int col = 4 * at.lane; p.mixed != nullptr && gates.up.differ() && col < gates.up.experts * ranks; col += 128) {
    store_words(p.mixed + number * p.mixed_pitch + col, uint2{0, 0});
  }
  __syncwarp();
  // Of every lane's slots: t and grad_out B of its two ranks, and what weighs the slot on either side.
  int i = 2 * at.lane & (ranks - 1);
  auto each = [&](auto visit) {
#pragma unroll 1
    for (int first = 0; first < width; first += 64) {
      int col = first + 2 * at.lane;
      bool inside = col < width;
      int slot = inside ? static_cast<int>(p.by_ranks.quotient(col)) : 0, place = row * gates.slots + slot;
      float gate = inside ? table.gate[place] : 0.f, factor = gate * table.scale[place];
      uint32_t t = inside || down_one ? load_words<uint32_t>(from + (down_one ? i : col)) : 0;
      FloatPair u{0.f, 0.f};
      if (p.gathers && inside) u = team.u.pair(row, table.up[place] * ranks + i);
      visit(inside, slot, place, factor, gates.weights && !up_one ? gate : factor, {low_of<T>(t), high_of<T>(t)}, u);
    }
  };
  // Where gates weigh weights: the gated sum of t, activated, and the gradient it gets before that.
  FloatPair mean{0.f, 0.f}, of_mean{0.f, 0.f};
  if (gates.weights) {
    each([&](bool, int, int, float factor, float gain, FloatPair t, FloatPair u) {
      mean = {mean.low + gain * t.low, mean.high + gain * t.high};
      of_mean = {of_mean.low + factor * u.low, of_mean.high + factor * u.high};
    });
    mean = sum_apart(mean, ranks / 2, 32), of_mean = sum_apart(of_mean, ranks / 2, 32);
    if (up_one && p.gathers) of_mean = team.u.pair(row, i);
    Activated low = activate_with_slope(p.activation, mean.low), high = activate_with_slope(p.activation, mean.high);
    mean = {low.value, high.value}, of_mean = {of_mean.low * low.slope, of_mean.high * high.slope};
  }
  FloatPair of_down{0.f, 0.f}, of_up{0.f, 0.f}, slope{0.f, 0.f};
  each([&](bool inside, int slot, int place, float factor, float gain, FloatPair t, FloatPair u) {
    FloatPair value = mean, own = of_mean;
    if (!gates.weights) {
      Activated low = activate_with_slope(p.activation, t.low), high = activate_with_slope(p.activation, t.high);
      value = {low.value, high.value}, slope = {low.slope, high.slope}, own = u;
    }
    if (p.dgates != nullptr) {
      float scale = table.scale[place], grad = 0.f;
      if (!gates.weights || !up_one) grad = scale * (value.low * u.low + value.high * u.high);
      if (gates.weights) grad += (up_one ? scale : 1.f) * (t.low * own.low + t.high * own.high);
      grad = sum_apart(grad, 1, ranks / 2);
      if (inside && i == 0) {
        if (p.up_bias != nullptr && !(gates.weights && up_one)) grad += grad_of_bias(p, team, row, slot);
        store_scalar(p.dgates, p.dgates_kind, number * gates.slots + slot, grad);
      }
    }
    if (!inside) return;
    own = {gain * own.low, gain * own.high};
    if (down_one) {
      of_down = {of_down.low + own.low, of_down.high + own.high};
    } else if (p.gathers) {
      if (!gates.weights) own = {own.low * slope.low, own.high * slope.high};
      int col = table.down[place] * ranks + i;
      store_words(own_dt + col, word_of<T>(own.low, own.high));
      if (dt != nullptr) store_words(dt + col, word_of<T>(own.low, own.high));
    }
    if (up_one) {
      of_up = {of_up.low + factor * value.low, of_up.high + factor * value.high};
    } else if (p.mixed != nullptr) {
      T* to = place_of_mixed(p, number, table.up[place], i);
      store_words(to, word_of<T>(factor * value.low, factor * value.high));
    }
  });
  if (down_one && p.gathers) {
    of_down = sum_apart(of_down, ranks / 2, 32);
    uint32_t word = word_of<T>(of_down.low * slope.low, of_down.high * slope.high);
    if (2 * at.lane < ranks) {
      store_words(own_dt + i, word);
      if (dt != nullptr) store_words(dt + i, word);
    }
  }
  if (up_one && p.mixed != nullptr) {
    of_up = gates.weights ? mean : sum_apart(of_up, ranks / 2, 32);
    if (2 * at.lane < ranks) store_words(place_of_mixed(p, number, 0, i), word_of<T>(of_up.low, of_up.high));
  }
}

// What the second product and the weights' gradients take, of all the team's rows.
template <typename T>
ADAMIX_DEVICE void unmix(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, const LaneRows& at) {
  const Gates& gates = p.gates;
  bool by_slots = unmixes_by_slots(p), differ = gates.down.differ() || gates.up.differ();
  int up_cols = gates.up.experts * p.ranks();
  for (int row = at.warp; row < at.count; row += kTeamWarps) {
    bool served = team.table.served[row] != 0;
    if (by_slots && served && !(differ && names_one_twice<T>(gates, team.table, at, row))) {
      unmix_slots(p, team, at, row);
    } else {
      unmix_row(p, team, at, row);
    }
    for (int col = up_cols + at.lane; p.mixed != nullptr && col < p.mixed_pitch; col += 32) {
      bool there = served && col - up_cols < gates.up.experts;
      float gate = there ? bias_gate<T>(p, team.table, row, col - up_cols) : 0.f;
      p.mixed[(at.first + row) * p.mixed_pitch + col] = from_float<T>(gate);
    }
  }
}

}  // namespace adamix
