// Parts of LoRA factors as matrix units take them, and their product: no shared memory, 16-bit factors.
//
// The order of a product's rows, columns and ranks is free, as long as both operands and the sums agree on it. Here a
// lane (g, q) = (lane / 4, lane % 4) holds ranks 4q .. 4q + 3 of lines 4g .. 4g + 3 of an operand of 32 lines, which
// are neighbours in memory, and sums for 4 rows of 8 neighbouring columns: 16 bytes of the weight.
#pragma once

#include "common/dtype.h"

namespace adamix {

constexpr int kQuadLines = 32, kQuadRanks = 16;

// [line][pair of ranks]
struct Quads {
  uint32_t pairs[4][2];
};

ADAMIX_DEVICE uint32_t pair_of(uint32_t low, uint32_t high) { return (low & 0xffffu) | high << 16; }

// Two numbers rounded to T, the first one in the low bits.
ADAMIX_DEVICE uint32_t rounded_pair(half, float low, float high) {
#if defined(ADAMIX_HOST)
  return pair_of(from_float<half>(low).bits, from_float<half>(high).bits);
#else
  half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
#endif
}
ADAMIX_DEVICE uint32_t rounded_pair(bfloat16, float low, float high) {
#if defined(ADAMIX_HOST)
  return pair_of(from_float<bfloat16>(low).bits, from_float<bfloat16>(high).bits);
#else
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
#endif
}
ADAMIX_DEVICE float number_of(half, uint32_t pair, int high) {
#if defined(ADAMIX_HOST)
  return to_float(half{static_cast<uint16_t>(high ? pair >> 16 : pair)});
#else
  half2 both = *reinterpret_cast<half2*>(&pair);
  return high ? __high2float(both) : __low2float(both);
#endif
}
ADAMIX_DEVICE float number_of(bfloat16, uint32_t pair, int high) {
  return float_of_bits(high ? pair & 0xffff0000u : pair << 16);
}

// Of a factor whose ranks are neighbours: four ranks of each of four lines.
ADAMIX_DEVICE Quads quads_of_lines(const uint2 (&lines)[4]) {
  Quads quads;
#pragma unroll
  for (int i = 0; i < 4; ++i) quads.pairs[i][0] = lines[i].x, quads.pairs[i][1] = lines[i].y;
  return quads;
}

// Of a factor whose lines are neighbours: four lines of each of four ranks.
ADAMIX_DEVICE Quads quads_of_ranks(const uint2 (&ranks)[4]) {
  Quads quads;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      uint32_t low = i < 2 ? ranks[2 * p].x : ranks[2 * p].y, high = i < 2 ? ranks[2 * p + 1].x : ranks[2 * p + 1].y;
      quads.pairs[i][p] = i % 2 == 0 ? pair_of(low, high) : pair_of(low >> 16, high >> 16);
    }
  }
  return quads;
}

// Numbers as two of bfloat16 each, which hold 16 of their digits; small holds what large lacks.
struct SplitQuads {
  Quads large, small;

  ADAMIX_DEVICE void set(int line, int pair, float low, float high) {
    uint32_t both = rounded_pair(bfloat16{}, low, high);
    large.pairs[line][pair] = both;
    small.pairs[line][pair] =
        rounded_pair(bfloat16{}, low - number_of(bfloat16{}, both, 0), high - number_of(bfloat16{}, both, 1));
  }
};
ADAMIX_DEVICE SplitQuads quads_of_ranks(const float4 (&ranks)[4]) {
  SplitQuads quads;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const float4 &low = ranks[2 * p], &high = ranks[2 * p + 1];
    quads.set(0, p, low.x, high.x), quads.set(1, p, low.y, high.y);
    quads.set(2, p, low.z, high.z), quads.set(3, p, low.w, high.w);
  }
  return quads;
}

// Without matrix units for T: the lanes pass each other what they hold.
template <typename T>
ADAMIX_DEVICE void add_quads_by_lanes(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  int lane = threadIdx.x % 32, row = lane / 4 * 4, col = lane % 4 * 2 * 4;
#pragma unroll 1
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      uint32_t rows[2], cols[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows[i] = __shfl_sync(0xffffffffu, left[2 * p + i], row + q);
        cols[i] = __shfl_sync(0xffffffffu, right[p], col + 4 * i + q);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[e] = fmaf(number_of(T{}, rows[e / 2], 0), number_of(T{}, cols[e % 2], 0), sums[e]);
        sums[e] = fmaf(number_of(T{}, rows[e / 2], 1), number_of(T{}, cols[e % 2], 1), sums[e]);
      }
    }
  }
}

// sums[e] += over 16 ranks of row g, g + 8 (e / 2) times column 2q, 2q + 1 (e % 2) of a product of the matrix units.
// low, high: this lane's pairs of rows g and g + 8; right: of column g. All lanes call.
ADAMIX_DEVICE void add_quads(half, float (&sums)[4], const uint32_t (&low)[2], const uint32_t (&high)[2],
                             const uint32_t (&right)[2]) {
  const uint32_t left[4] = {low[0], high[0], low[1], high[1]};
#if ADAMIX_ARCH >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#elif ADAMIX_ARCH >= 750
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[2 * p]), "r"(left[2 * p + 1]), "r"(right[p]));
  }
#else
  add_quads_by_lanes<half>(sums, left, right);
#endif
}

ADAMIX_DEVICE void add_quads(bfloat16, float (&sums)[4], const uint32_t (&low)[2], const uint32_t (&high)[2],
                             const uint32_t (&right)[2]) {
  const uint32_t left[4] = {low[0], high[0], low[1], high[1]};
#if ADAMIX_ARCH >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#else
  add_quads_by_lanes<bfloat16>(sums, left, right);
#endif
}

}  // namespace adamix
