// LoRA factors folded into a weight of 16 bits by matrix units, without shared memory.
#include "common/piece.h"
#include "merge/lora_quads.h"
#include "merge/merge.h"
#include "merge/shares.h"

namespace adamix {

// A warp merges 32 rows of 32 columns of the block's tile.
constexpr int kWarpsAcross = kLoraCols / kQuadLines;
static_assert(kLoraRows / kQuadLines * kWarpsAcross * 32 == kMergeThreads, "one part of the tile a warp");

// One group's part of a warp's tile: a lane holds operands' lines by lane / 4, its ranks by lane % 4. a_line: of A's
// lines, the lane's first; b_line: of B's, counted in the group; before: groups before it.
template <typename T, bool FanInFanOut>
ADAMIX_DEVICE void add_product(const MergeLora<T>& p, float (&sums)[2][4][4], int a_line, int b_line, int64_t before) {
  int rank = threadIdx.x % 4 * 4;
  const uint16_t* a =
      static_cast<const uint16_t*>(p.a.data[blockIdx.y]) + (before * p.rank + rank) * p.features + a_line;
  const uint16_t* b =
      static_cast<const uint16_t*>(p.b.data[blockIdx.y]) + (before * p.per_group + b_line) * p.rank + rank;
  bool a_inside = a_line < p.features, b_inside[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) b_inside[i] = static_cast<unsigned>(b_line + i) < static_cast<unsigned>(p.per_group);
#pragma unroll 1
  for (int first = 0; first < p.rank; first += kQuadRanks, rank += kQuadRanks) {
    bool there = rank < p.rank;
    const bool lines[4] = {there && b_inside[0], there && b_inside[1], there && b_inside[2], there && b_inside[3]};
    Quads of_a = quads_along_lines(a, p.features, there && a_inside), of_b = quads_along_ranks(b, p.rank, lines);
    const Quads &left = FanInFanOut ? of_a : of_b, &right = FanInFanOut ? of_b : of_a;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        add_quads(T{}, sums[t][j], left.pairs[2 * t], left.pairs[2 * t + 1], right.pairs[j]);
      }
    }
    a += kQuadRanks * static_cast<int64_t>(p.features), b += kQuadRanks;
  }
}

// The same of factors of float32, in three products: what both small halves give is below the last digit of a 16-bit
// sum.
template <typename T, bool FanInFanOut>
ADAMIX_DEVICE void add_split_product(const MergeLora<T>& p, float (&sums)[2][4][4], int a_line, int b_line,
                                     int64_t before) {
  int rank = threadIdx.x % 4 * 4;
  const float* a = static_cast<const float*>(p.a.data[blockIdx.y]) + (before * p.rank + rank) * p.features + a_line;
  const float* b = static_cast<const float*>(p.b.data[blockIdx.y]) + (before * p.per_group + b_line) * p.rank + rank;
  bool a_inside = a_line < p.features, b_inside[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) b_inside[i] = static_cast<unsigned>(b_line + i) < static_cast<unsigned>(p.per_group);
  float small[2][4][4] = {};
#pragma unroll 1
  for (int first = 0; first < p.rank; first += kQuadRanks, rank += kQuadRanks) {
    bool there = rank < p.rank;
    float4 ranks[4], lines[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      ranks[e] = lines[e] = float4{0.f, 0.f, 0.f, 0.f};
      if (there && a_inside) ranks[e] = *reinterpret_cast<const float4*>(a + e * static_cast<int64_t>(p.features));
      if (there && b_inside[e]) lines[e] = *reinterpret_cast<const float4*>(b + e * p.rank);
    }
    SplitQuads of_a;
    of_a.set(0, 0, ranks[0].x, ranks[1].x), of_a.set(0, 1, ranks[2].x, ranks[3].x);
    of_a.set(1, 0, ranks[0].y, ranks[1].y), of_a.set(1, 1, ranks[2].y, ranks[3].y);
    of_a.set(2, 0, ranks[0].z, ranks[1].z), of_a.set(2, 1, ranks[2].z, ranks[3].z);
    of_a.set(3, 0, ranks[0].w, ranks[1].w), of_a.set(3, 1, ranks[2].w, ranks[3].w);
    // Two of B's lines at a time.
#pragma unroll
    for (int both = 0; both < 2; ++both) {
      SplitQuads of_b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float4 line = lines[2 * both + i];
        of_b.set(i, 0, line.x, line.y), of_b.set(i, 1, line.z, line.w);
      }
      auto add = [both](float (&to)[2][4][4], const Quads& lines_a, const Quads& lines_b) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (FanInFanOut) {
            int t = j / 2, i = j % 2;
            add_quads(bfloat16{}, to[t][2 * both + i], lines_a.pairs[2 * t], lines_a.pairs[2 * t + 1],
                      lines_b.pairs[i]);
          } else {
            add_quads(bfloat16{}, to[both][j], lines_b.pairs[0], lines_b.pairs[1], lines_a.pairs[j]);
          }
        }
      };
      add(sums, of_a.large, of_b.large), add(small, of_a.small, of_b.large), add(small, of_a.large, of_b.small);
    }
    a += kQuadRanks * static_cast<int64_t>(p.features), b += kQuadRanks;
  }
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      // Of an infinite factor the small half is NaN.
      for (int e = 0; e < 4; ++e) sums[t][j][e] += small[t][j][e] == small[t][j][e] ? small[t][j][e] : 0.f;
    }
  }
}

// weight, out, a and b start at multiples of 16 bytes; width is a multiple of 8, features and rank of 4. Split: of
// factors of float32.
template <typename T, bool FanInFanOut, bool Split>
ADAMIX_DEVICE void merge_tile(const MergeLora<T>& p) {
  int tiles = (p.width + kLoraCols - 1) / kLoraCols;
  int row0 = blockIdx.x / tiles * kLoraRows, col0 = blockIdx.x % tiles * kLoraCols;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int warp_row = row0 + warp / kWarpsAcross * kQuadLines, warp_col = col0 + warp % kWarpsAcross * kQuadLines;
  int row = warp_row + lane / 4 * 4, col = warp_col + lane % 4 * 8;  // of this lane's 4 rows of 8 columns
  int64_t at = static_cast<int64_t>(row) * p.width + col;
  int height = col < p.width ? p.height - row : 0;  // rows of this lane's that are there

  bool written = false;
  Piece<uint32_t> words[4];
  auto load = [&](int i) {
    uint4 four{};
    if (i < height)
      four = *reinterpret_cast<const uint4*>((written ? p.out : p.weight)[blockIdx.y] + at +
                                             i * static_cast<int64_t>(p.width));
    words[i].values[0] = four.x, words[i].values[1] = four.y, words[i].values[2] = four.z, words[i].values[3] = four.w;
  };
  auto store = [&](int i) {
    const uint32_t* of = words[i].values;
    if (i < height)
      store_whole(p.out[blockIdx.y] + at + i * static_cast<int64_t>(p.width), uint4{of[0], of[1], of[2], of[3]});
  };
  // Three products leave no registers for the tile meanwhile: a group then reads what the one before has written.
  if constexpr (!Split) {
#pragma unroll
    for (int i = 0; i < 4; ++i) load(i);
  }
  for (int group = 0; group < p.here; ++group) {
    if (!p.touches(group, row0, col0)) continue;
    int a_line = (FanInFanOut ? warp_row : warp_col) + lane / 4 * 4;
    int b_line = (FanInFanOut ? warp_col : warp_row) + lane / 4 * 4 - p.offsets[group];
    float sums[2][4][4] = {};
    if constexpr (Split) {
      add_split_product<T, FanInFanOut>(p, sums, a_line, b_line, p.first_group + group);
    } else {
      add_product<T, FanInFanOut>(p, sums, a_line, b_line, p.first_group + group);
    }
    if constexpr (Split) {
#pragma unroll
      for (int i = 0; i < 4; ++i) load(i);
    }
    float scaling = static_cast<float>(p.scaling);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float both[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          int e = 2 * w + h;
          both[h] = fmaf(scaling, sums[i / 2][e % 4][i % 2 * 2 + e / 4], number_of(T{}, words[i].values[w], h));
        }
        // What the group does not touch keeps its bits.
        int output = (FanInFanOut ? col + 2 * w : row + i) - p.offsets[group];
        auto touched = [&](int n) { return static_cast<unsigned>(n) < static_cast<unsigned>(p.per_group); };
        uint32_t low = touched(output) ? 0xffffu : 0u;
        uint32_t high = touched(FanInFanOut ? output + 1 : output) ? 0xffff0000u : 0u, mask = low | high;
        words[i].values[w] = (rounded_pair(T{}, both[0], both[1]) & mask) | (words[i].values[w] & ~mask);
      }
      if constexpr (Split) store(i);
    }
    written = Split;
  }
  if (written) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (Split) load(i);
    store(i);
  }
}

template <typename T, bool FanInFanOut, bool Split>
__global__ void __launch_bounds__(kMergeThreads, 2) merge_lora_product_kernel(MergeLora<T> p) {
  // Older GPUs have no matrix units for bfloat16.
  if constexpr (!Split || ADAMIX_ARCH == 0 || ADAMIX_ARCH >= 800) merge_tile<T, FanInFanOut, Split>(p);
}

#define ADAMIX_INSTANTIATE(T)                                                        \
  template __global__ void merge_lora_product_kernel<T, false, false>(MergeLora<T>); \
  template __global__ void merge_lora_product_kernel<T, false, true>(MergeLora<T>);  \
  template __global__ void merge_lora_product_kernel<T, true, false>(MergeLora<T>);  \
  template __global__ void merge_lora_product_kernel<T, true, true>(MergeLora<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_merge_lora_product(const MergeLora<T>& params, bool split, const Device& device) {
  auto kernel = params.fan_in_fan_out
                    ? (split ? merge_lora_product_kernel<T, true, true> : merge_lora_product_kernel<T, true, false>)
                    : (split ? merge_lora_product_kernel<T, false, true> : merge_lora_product_kernel<T, false, false>);
  launch("merge_lora_product", kernel, {params.blocks(), kMergeThreads, 0}, device, params);
}

template void launch_merge_lora_product(const MergeLora<half>&, bool, const Device&);
template void launch_merge_lora_product(const MergeLora<bfloat16>&, bool, const Device&);
#endif

}  // namespace adamix
