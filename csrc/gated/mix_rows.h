// What gates make of one row's narrow values: a warp's work, in fp32, between the two products.
#pragma once

#include "common/piece.h"
#include "common/warp.h"
#include "gated/gated.h"

namespace adamix {

// Of a row: mixed[slot of up] = gate times scale times act(t[slot of down]), of a bank of one the sum over all slots.
// Where gates weigh weights: act(the gated sum of t), times gate and scale of each slot of up. mixed, bias_gates: of
// the row, or null. All lanes call.
template <typename T>
ADAMIX_DEVICE void mix_row(const GatedBanks<T>& p, int row, const T* t, T* mixed, T* bias_gates) {
  const Gates& gates = p.gates;
  int64_t at = gates.at(row);
  int ranks = p.ranks(), lane = threadIdx.x % 32;
  t += static_cast<int64_t>(row) * gates.down.slots * ranks;
  for (int i = lane; mixed != nullptr && i < ranks; i += 32) {
    auto of = [&](int slot) {
      return activate(p.activation, to_float(t[gates.down.experts == 1 ? i : slot * ranks + i]));
    };
    float z = 0.f;
    if (gates.weights) {
      for (int slot = 0; slot < gates.slots; ++slot) {
        z += gates.gate(at, slot) * gates.down_scale(at, slot) * to_float(t[slot * ranks + i]);
      }
      z = activate(p.activation, z);
    } else if (gates.up.experts == 1) {
      for (int slot = 0; slot < gates.slots; ++slot) z += gates.gate(at, slot) * gates.scale(at, slot) * of(slot);
    }
    if (gates.up.experts == 1) {
      mixed[i] = from_float<T>(z);
      continue;
    }
    for (int slot = 0; slot < gates.slots; ++slot) {
      float one = gates.weights ? z : of(slot);
      mixed[slot * ranks + i] = from_float<T>(gates.gate(at, slot) * gates.scale(at, slot) * one);
    }
  }
  if (bias_gates == nullptr) return;
  for (int slot = lane; slot < gates.up.slots; slot += 32) {
    float gate = gates.weights ? 1.f : 0.f;
    if (gates.up.experts > 1) {
      gate = gates.gate(at, slot);
    } else if (!gates.weights) {
      for (int of = 0; of < gates.slots; ++of) gate += gates.gate(at, of);
    }
    bias_gates[slot] = from_float<T>(gate);
  }
}

// sums[slot] = the bias of the slot's expert up times grad_out. All lanes call.
template <typename T>
ADAMIX_DEVICE void bias_gates_grad(const GatedBanks<T>& p, int64_t at, const T* grad_out, float* sums) {
  constexpr int kSize = Piece<T>::kSize, kTogether = 4;
  int cols = p.ranges.cols, lane = threadIdx.x % 32;
  bool aligned = cols % kSize == 0 && reinterpret_cast<uintptr_t>(grad_out) % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(p.up_bias) % 16 == 0;
#pragma unroll 1
  for (int slot = 0; slot < p.gates.slots; slot += kTogether) {
    const T* bias[kTogether];
    float own[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      // Behind the last slot: the first, left out below.
      int of = slot + i < p.gates.slots ? slot + i : slot;
      bias[i] = p.up_bias + static_cast<int64_t>(p.gates.up.named(at + of, of)) * cols;
    }
#pragma unroll 1
    for (int col = lane * kSize; col < cols; col += 32 * kSize) {
      Piece<T> grad = load_piece(grad_out + col, cols - col, aligned);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        Piece<T> piece = load_piece(bias[i] + col, cols - col, aligned);
#pragma unroll
        for (int e = 0; e < kSize; ++e) own[i] += to_float(piece.values[e]) * to_float(grad.values[e]);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      float sum = warp_reduce(own[i], Add{});
      if (lane == 0 && slot + i < p.gates.slots) sums[slot + i] = sum;
    }
  }
}

// The backward of mix_row: dt of every slot of down, and the gates' gradient in sums [slots] of the warp. u: grad_out B
// of every slot of up; grad_out: the row, for the biases of up. All lanes call; sums are complete on return.
template <typename T>
ADAMIX_DEVICE void unmix_row(const GatedBanks<T>& p, int row, const T* t, const T* u, const T* grad_out, T* dt,
                             float* sums) {
  const Gates& gates = p.gates;
  int64_t at = gates.at(row);
  int ranks = p.ranks(), lane = threadIdx.x % 32;
  t += static_cast<int64_t>(row) * gates.down.slots * ranks;
  u += static_cast<int64_t>(row) * gates.up.slots * ranks;
  dt += static_cast<int64_t>(row) * gates.down.slots * ranks;
  bool down_one = gates.down.experts == 1, up_one = gates.up.experts == 1;
  if (p.up_bias != nullptr && sums != nullptr && !(gates.weights && up_one)) {
    bias_gates_grad(p, at, grad_out, sums);
  } else {
    for (int slot = lane; sums != nullptr && slot < gates.slots; slot += 32) sums[slot] = 0.f;
  }
  __syncwarp();
  for (int i0 = 0; i0 < ranks; i0 += 32) {
    int i = i0 + lane;
    bool inside = i < ranks;
    auto t_of = [&](int slot) { return inside ? to_float(t[down_one ? i : slot * ranks + i]) : 0.f; };
    auto u_of = [&](int slot) { return inside ? to_float(u[up_one ? i : slot * ranks + i]) : 0.f; };
    float before = 0.f, behind = 0.f, z = 0.f;  // of the averaged expert, where gates weigh weights
    if (gates.weights) {
      for (int slot = 0; slot < gates.slots; ++slot) {
        before += gates.gate(at, slot) * gates.down_scale(at, slot) * t_of(slot);
        if (!up_one) behind += gates.gate(at, slot) * gates.scale(at, slot) * u_of(slot);
      }
      if (up_one) behind = u_of(0);
      z = activate(p.activation, before);
      behind *= activation_slope(p.activation, before);
    }
    float all = 0.f;
    for (int slot = 0; slot < gates.slots; ++slot) {
      float gate = gates.gate(at, slot), scale = gates.scale(at, slot), own = t_of(slot), of_u = u_of(slot), product;
      if (gates.weights) {
        float down_scale = gates.down_scale(at, slot);
        product = down_scale * behind * own + (up_one ? 0.f : scale * z * of_u);
        if (inside) dt[slot * ranks + i] = from_float<T>(gate * down_scale * behind);
      } else {
        product = scale * activate(p.activation, own) * of_u;
        float d = gate * scale * of_u * activation_slope(p.activation, own);
        all += d;
        if (inside && !down_one) dt[slot * ranks + i] = from_float<T>(d);
      }
      if (sums == nullptr) continue;
      product = warp_reduce(product, Add{});
      if (lane == 0) sums[slot] += product;
    }
    if (inside && down_one) dt[i] = from_float<T>(all);
  }
  __syncwarp();
}

}  // namespace adamix
