// Parts of LoRA factors that are the means of banks: four lines and four ranks a lane, as matrix units take them.
#pragma once

#include "merge/lora_quads.h"
#include "merge/merge.h"
#include "merge/shares.h"

namespace adamix {

// A factor's element, four neighbours of it, and a lane's part of an operand; of float32 it is split in two.
template <typename T, bool Split>
struct FactorOf {
  using Element = T;
  using Four = uint2;
  using Operand = Quads;
};
template <typename T>
struct FactorOf<T, true> {
  using Element = float;
  using Four = float4;
  using Operand = SplitQuads;
};

template <typename T>
ADAMIX_DEVICE void numbers_of(T, float (&numbers)[4], const uint2& four) {
  numbers[0] = number_of(T{}, four.x, 0), numbers[1] = number_of(T{}, four.x, 1);
  numbers[2] = number_of(T{}, four.y, 0), numbers[3] = number_of(T{}, four.y, 1);
}
ADAMIX_DEVICE void numbers_of(float, float (&numbers)[4], const float4& four) {
  numbers[0] = four.x, numbers[1] = four.y, numbers[2] = four.z, numbers[3] = four.w;
}
template <typename T>
ADAMIX_DEVICE uint2 rounded_four(T, const float (&numbers)[4]) {
  return {rounded_pair(T{}, numbers[0], numbers[1]), rounded_pair(T{}, numbers[2], numbers[3])};
}
ADAMIX_DEVICE float4 rounded_four(float, const float (&numbers)[4]) {
  return {numbers[0], numbers[1], numbers[2], numbers[3]};
}

// One side's experts and their shares of the mean, as merge_banks has them: the same bits.
template <typename Element, typename Four>
struct LoraMean {
  const LoraBank& bank;
  MergeShares<float> shares;
  float total, inverse;
  bool exact;  // whether a quotient by `total` is the product with `inverse`

  // Every thread of the block calls.
  ADAMIX_DEVICE LoraMean(const LoraBank& of, const MergeShares<float>& memory) : bank(of), shares(memory) {
    total = shares.fill(bank.scores[blockIdx.y], bank.scored, bank.experts);
    inverse = 1.f / total;
    float halved = total;
    while (halved > 1.f) halved *= 0.5f;
    exact = halved == 1.f;
  }

  // Four neighbours at each of at, at + step, .. of an expert; 0 where not inside. Kept: in bank.mean, too.
  ADAMIX_DEVICE void load(Four (&found)[4], int64_t at, int64_t step, bool inside, bool kept) const {
    const Element* data = static_cast<const Element*>(bank.data[blockIdx.y]) + at;
    auto four_at = [&](int e, int m) {
      return inside ? *reinterpret_cast<const Four*>(data + e * step + m * bank.stride) : Four{};
    };
    if (bank.experts == 1) {
#pragma unroll
      for (int e = 0; e < 4; ++e) found[e] = four_at(e, 0);
      return;
    }
    float sums[4][4];
#pragma unroll 2
    for (int m = 0; m < bank.experts; ++m) {
      float share = bank.scored == Kind::kNone ? 1.f : shares.values[m];
      Four fours[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) fours[e] = four_at(e, m);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float numbers[4];
        numbers_of(Element{}, numbers, fours[e]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[e][i] = m == 0 ? numbers[i] * share : fmaf(numbers[i], share, sums[e][i]);
        }
      }
    }
    // One branch for all: quotients are long.
    if (exact) {
#pragma unroll
      for (int e = 0; e < 16; ++e) sums[e / 4][e % 4] *= inverse;
    } else {
#pragma unroll
      for (int e = 0; e < 16; ++e) sums[e / 4][e % 4] /= total;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      found[e] = rounded_four(Element{}, sums[e]);
      if (!kept) continue;
      Element* to = static_cast<Element*>(bank.mean) + blockIdx.y * bank.stride + at + e * step;
      *reinterpret_cast<Four*>(to) = found[e];
    }
  }
};

}  // namespace adamix
