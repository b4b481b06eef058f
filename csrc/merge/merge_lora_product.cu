// LoRA factors of 16 bits folded into a weight of the same dtype by matrix units, without shared memory.
#include "merge/lora_quads.h"
#include "merge/merge.h"
#include "merge/shares.h"

namespace adamix {

// A warp merges 32 rows of 32 columns of the block's tile.
constexpr int kWarpsAcross = kLoraCols / kQuadLines;
static_assert(kLoraRows / kQuadLines * kWarpsAcross * 32 == kMergeThreads, "one part of the tile a warp");

// weight, out, a and b start at multiples of 16 bytes; width is a multiple of 8, features and rank of 4.
template <typename T, bool FanInFanOut>
__global__ void __launch_bounds__(kMergeThreads, 2) merge_lora_product_kernel(MergeLora<T> p) {
  int tiles = (p.width + kLoraCols - 1) / kLoraCols;
  int row0 = blockIdx.x / tiles * kLoraRows, col0 = blockIdx.x % tiles * kLoraCols;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int warp_row = row0 + warp / kWarpsAcross * kQuadLines, warp_col = col0 + warp % kWarpsAcross * kQuadLines;
  int row = warp_row + lane / 4 * 4, col = warp_col + lane % 4 * 8;  // of this lane's 4 rows of 8 columns
  int64_t at = static_cast<int64_t>(row) * p.width + col;
  int height = col < p.width ? p.height - row : 0;  // rows of this lane's that are there

  Piece<uint32_t> words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = i < height ? *reinterpret_cast<const Piece<uint32_t>*>(p.weight + at + i * static_cast<int64_t>(p.width))
                          : Piece<uint32_t>{};
  }
  for (int group = 0; group < p.here; ++group) {
    if (!p.touches(group, row0, col0)) continue;
    // A lane holds operands' lines by lane / 4, its ranks by lane % 4; outputs are counted in the group.
    int a_line = (FanInFanOut ? warp_row : warp_col) + lane / 4 * 4, rank = lane % 4 * 4;
    int b_line = (FanInFanOut ? warp_col : warp_row) + lane / 4 * 4 - p.offsets[group];
    int64_t before = p.first_group + group;
    const uint16_t* a = static_cast<const uint16_t*>(p.a.data) + (before * p.rank + rank) * p.features + a_line;
    const uint16_t* b = static_cast<const uint16_t*>(p.b.data) + (before * p.per_group + b_line) * p.rank + rank;
    bool a_inside = a_line < p.features, b_inside[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) b_inside[i] = static_cast<unsigned>(b_line + i) < static_cast<unsigned>(p.per_group);

    float sums[2][4][4] = {};
#pragma unroll 1
    for (; rank - lane % 4 * 4 < p.rank;
         rank += kQuadRanks, a += kQuadRanks * static_cast<int64_t>(p.features), b += kQuadRanks) {
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
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < height) *reinterpret_cast<Piece<uint32_t>*>(p.out + at + i * static_cast<int64_t>(p.width)) = words[i];
  }
}

#define ADAMIX_INSTANTIATE(T)                                                 \
  template __global__ void merge_lora_product_kernel<T, false>(MergeLora<T>); \
  template __global__ void merge_lora_product_kernel<T, true>(MergeLora<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_merge_lora_product(const MergeLora<T>& params, const Device& device) {
  launch("merge_lora_product",
         params.fan_in_fan_out ? merge_lora_product_kernel<T, true> : merge_lora_product_kernel<T, false>,
         {dim3(params.tiles()), kMergeThreads, 0}, device, params);
}

template void launch_merge_lora_product(const MergeLora<half>&, const Device&);
template void launch_merge_lora_product(const MergeLora<bfloat16>&, const Device&);
#endif

}  // namespace adamix
