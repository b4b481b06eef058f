// LoRA factors, A's possibly the mean of a bank, folded into a weight of 16 bits by matrix units, in one launch.
#include "common/piece.h"
#include "merge/lora_banks.h"

namespace adamix {

// A warp merges 32 rows of 32 columns of the block's tile.
constexpr int kWarpsAcross = kLoraCols / kQuadLines;
static_assert(kLoraRows / kQuadLines * kWarpsAcross * 32 == kMergeThreads, "one part of the tile a warp");

// A's lines of a tile, which all tiles of a block share: a lane's part is four words a place.
template <bool FanInFanOut, bool Split>
struct HeldLines {
  static constexpr int kWords = Split ? 4 : 2, kStrips = (FanInFanOut ? kLoraRows : kLoraCols) / kQuadLines;
  uint4* words;  // [steps, strips of 32 lines, kWords, lanes]

  template <typename Memory>
  ADAMIX_BOTH HeldLines(Memory& memory, int rank) {
    int steps = (rank + kQuadRanks - 1) / kQuadRanks;
    words = memory.template take<uint4>(steps * kStrips * kWords * 32);
  }

  ADAMIX_DEVICE uint4* place(int step, int strip) const {
    return words + (step * kStrips + strip) * kWords * 32 + threadIdx.x % 32;
  }
  ADAMIX_DEVICE static void put(uint4* to, const Quads& quads) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t (&first)[2] = quads.pairs[2 * half], (&second)[2] = quads.pairs[2 * half + 1];
      to[half * 32] = uint4{first[0], first[1], second[0], second[1]};
    }
  }
  ADAMIX_DEVICE static void put(uint4* to, const SplitQuads& quads) { put(to, quads.large), put(to + 64, quads.small); }
  ADAMIX_DEVICE static Quads get(const uint4* from) {
    uint4 low = from[0], high = from[32];
    return {{{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}}};
  }
};

template <bool FanInFanOut, bool Split>
struct ProductMemory {
  HeldLines<FanInFanOut, Split> held;
  MergeShares<float> shares;

  template <typename Memory>
  ADAMIX_BOTH ProductMemory(Memory& memory, int rank, int experts) : held(memory, rank), shares(memory, experts) {}
};

// sums += B A of a warp's part, or its transpose: A's lines are the columns, or the rows.
template <bool FanInFanOut, typename T>
ADAMIX_DEVICE void add_tile(T type, float (&sums)[2][4][4], const Quads& of_a, const Quads& of_b) {
  const Quads &rows = FanInFanOut ? of_a : of_b, &columns = FanInFanOut ? of_b : of_a;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      add_quads(type, sums[t][j], rows.pairs[2 * t], rows.pairs[2 * t + 1], columns.pairs[j]);
    }
  }
}

// The same of two of B's four lines, the first or the last, which are of_b's first.
template <bool FanInFanOut>
ADAMIX_DEVICE void add_half(float (&sums)[2][4][4], const Quads& of_a, const Quads& of_b, int both) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (FanInFanOut) {
      int t = j / 2, i = j % 2;
      add_quads(bfloat16{}, sums[t][2 * both + i], of_a.pairs[2 * t], of_a.pairs[2 * t + 1], of_b.pairs[i]);
    } else {
      add_quads(bfloat16{}, sums[both][j], of_b.pairs[0], of_b.pairs[1], of_a.pairs[j]);
    }
  }
}

// A block's tiles side by side along the outputs. Weights, out, a and b start at multiples of 16 bytes; width is a
// multiple of 8, features and rank of 4. Split: of factors of float32.
template <typename T, bool FanInFanOut, bool Split>
class TileMerger {
  using Factor = FactorOf<T, Split>;
  using Element = typename Factor::Element;
  using Four = typename Factor::Four;
  static constexpr int kLines = FanInFanOut ? kLoraRows : kLoraCols, kOutputs = FanInFanOut ? kLoraCols : kLoraRows;

 public:
  ADAMIX_DEVICE TileMerger(const MergeLoraProduct<T>& params, ProductMemory<FanInFanOut, Split> memory)
      : p_(params), held_(memory.held), a_(params.a, memory.shares) {
    int strips = (p_.features + kLines - 1) / kLines, outputs = FanInFanOut ? p_.width : p_.height;
    line0_ = static_cast<int>(blockIdx.x) % strips * kLines;
    begin_ = static_cast<int>(blockIdx.x) / strips * p_.tall * kOutputs;
    end_ = begin_ + p_.tall * kOutputs < outputs ? begin_ + p_.tall * kOutputs : outputs;
  }

  ADAMIX_DEVICE void run() {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Of this lane's 4 rows of 8 columns.
    int row = (FanInFanOut ? line0_ : begin_) + warp / kWarpsAcross * kQuadLines + lane / 4 * 4;
    int col = (FanInFanOut ? begin_ : line0_) + warp % kWarpsAcross * kQuadLines + lane % 4 * 8;
    int64_t at = static_cast<int64_t>(row) * p_.width + col, width = p_.width;
    const T* weight = p_.weight[blockIdx.y] + at;
    T* out = p_.out + (static_cast<int64_t>(blockIdx.y) * p_.height * width + at);
    for (int output0 = begin_; output0 < end_; output0 += kOutputs) {
      int height = col < p_.width ? p_.height - row : 0;  // rows of this lane's that are there
      uint4 words[4];
      auto load = [&] {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = i < height ? *reinterpret_cast<const uint4*>(weight + i * width) : uint4{};
        }
      };
      // Three products leave no registers for the tile meanwhile.
      bool loaded = !Split;
      if constexpr (!Split) load();
      for (int group = 0; group < p_.here; ++group) {
        int from = output0 - p_.offsets[group];  // the tile's first output, counted in the group
        if (from >= p_.per_group || from + kOutputs <= 0) continue;
        if (group != held_group_) hold(group);
        float sums[2][4][4] = {};
        multiply(sums, group, from);
        if (!loaded) load(), loaded = true;
        if (from >= 0 && from + kOutputs <= p_.per_group) {
          add<true>(words, sums, 0);
        } else {
          add<false>(words, sums, (FanInFanOut ? col : row) - p_.offsets[group]);
        }
      }
      if (!loaded) load();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < height) store_whole(out + i * width, words[i]);
      }
      (FanInFanOut ? col : row) += kOutputs;
      int64_t step = FanInFanOut ? kOutputs : kOutputs * width;
      weight += step, out += step;
    }
  }

 private:
  // held_ = A of `group`. The block that has the group's first output writes its mean, too.
  ADAMIX_DEVICE void hold(int group) {
    held_group_ = group;
    int steps = (p_.rank + kQuadRanks - 1) / kQuadRanks, lane = threadIdx.x % 32;
    bool kept = p_.offsets[group] >= begin_ && p_.offsets[group] < end_;
    __syncthreads();
    for (int item = threadIdx.x / 32; item < steps * held_.kStrips; item += kMergeThreads / 32) {
      int step = item / held_.kStrips, rank = step * kQuadRanks + lane % 4 * 4;
      int line = line0_ + item % held_.kStrips * kQuadLines + lane / 4 * 4;
      bool inside = rank < p_.rank && line < p_.features;
      int64_t row = static_cast<int64_t>(p_.first_group + group) * p_.rank + rank;
      Four ranks[4];
      a_.load(ranks, row * p_.features + line, p_.features, inside, kept && inside);
      held_.put(held_.place(step, item % held_.kStrips), quads_of_ranks(ranks));
    }
    __syncthreads();
  }

  // sums = B_g A_g of the warp's part of the tile, or its transpose; from: the tile's first output in the group.
  ADAMIX_DEVICE void multiply(float (&sums)[2][4][4], int group, int from) {
    int lane = threadIdx.x % 32, down = threadIdx.x / 32 / kWarpsAcross, across = threadIdx.x / 32 % kWarpsAcross;
    int line = from + (FanInFanOut ? across : down) * kQuadLines + lane / 4 * 4, rank = lane % 4 * 4;
    int64_t row = static_cast<int64_t>(p_.first_group + group) * p_.per_group + line;
    const Element* b = static_cast<const Element*>(p_.b[blockIdx.y]) + (row * p_.rank + rank);
    bool inside[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) inside[i] = static_cast<unsigned>(line + i) < static_cast<unsigned>(p_.per_group);
    float small[2][4][4] = {};
    const uint4* from_a = held_.place(0, FanInFanOut ? down : across);
#pragma unroll 1
    for (; rank - lane % 4 * 4 < p_.rank; rank += kQuadRanks) {
      auto line_of_b = [&](int i) {
        return inside[i] && rank < p_.rank ? *reinterpret_cast<const Four*>(b + i * p_.rank) : Four{};
      };
      if constexpr (!Split) {
        const Four lines[4] = {line_of_b(0), line_of_b(1), line_of_b(2), line_of_b(3)};
        add_tile<FanInFanOut>(T{}, sums, held_.get(from_a), quads_of_lines(lines));
      } else {
        Quads large = held_.get(from_a);
        // Two lines of B at a time: for more there are no registers.
#pragma unroll
        for (int both = 0; both < 2; ++both) {
          SplitQuads of_b;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            Four line = line_of_b(2 * both + i);
            of_b.set(i, 0, line.x, line.y), of_b.set(i, 1, line.z, line.w);
          }
          // What both small halves give is below the last digit of a 16-bit sum.
          add_half<FanInFanOut>(sums, large, of_b.large, both);
          add_half<FanInFanOut>(small, held_.get(from_a + 64), of_b.large, both);
          add_half<FanInFanOut>(small, large, of_b.small, both);
        }
      }
      b += kQuadRanks, from_a += held_.kStrips * held_.kWords * 32;
    }
    if constexpr (Split) {
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
  }

  // words += scaling * sums, rounded; Whole: of every output, else of those in the group, `output` this lane's first.
  template <bool Whole>
  ADAMIX_DEVICE void add(uint4 (&words)[4], const float (&sums)[2][4][4], int output) const {
    auto touched = [&](int n) { return static_cast<unsigned>(output + n) < static_cast<unsigned>(p_.per_group); };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t own[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float both[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          int e = 2 * w + h;
          both[h] = fmaf(p_.scaling, sums[i / 2][e % 4][i % 2 * 2 + e / 4], number_of(T{}, own[w], h));
        }
        uint32_t merged = rounded_pair(T{}, both[0], both[1]);
        if constexpr (!Whole) {
          // What the group does not touch keeps its bits.
          uint32_t low = touched(FanInFanOut ? 2 * w : i) ? 0xffffu : 0u;
          uint32_t high = touched(FanInFanOut ? 2 * w + 1 : i) ? 0xffff0000u : 0u, mask = low | high;
          merged = (merged & mask) | (own[w] & ~mask);
        }
        own[w] = merged;
      }
      words[i] = uint4{own[0], own[1], own[2], own[3]};
    }
  }

  const MergeLoraProduct<T>& p_;
  HeldLines<FanInFanOut, Split> held_;
  LoraMean<Element, Four> a_;
  int line0_, begin_, end_;  // the block's first input; its outputs
  int held_group_ = -1;
};

template <typename T, bool FanInFanOut, bool Split>
__global__ void __launch_bounds__(kMergeThreads, 2) merge_lora_product_kernel(MergeLoraProduct<T> p) {
  // Older GPUs have no matrix units for bfloat16.
  if constexpr (!Split || ADAMIX_ARCH == 0 || ADAMIX_ARCH >= 800) {
    SharedMemory memory;
    TileMerger<T, FanInFanOut, Split>(p, ProductMemory<FanInFanOut, Split>(memory, p.rank, p.a.experts)).run();
  }
}

#define ADAMIX_INSTANTIATE(T)                                                               \
  template __global__ void merge_lora_product_kernel<T, false, false>(MergeLoraProduct<T>); \
  template __global__ void merge_lora_product_kernel<T, false, true>(MergeLoraProduct<T>);  \
  template __global__ void merge_lora_product_kernel<T, true, false>(MergeLoraProduct<T>);  \
  template __global__ void merge_lora_product_kernel<T, true, true>(MergeLoraProduct<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
size_t merge_lora_product_bytes(int rank, int experts, bool fan_in_fan_out, bool split) {
  if (fan_in_fan_out) {
    return split ? shared_bytes<ProductMemory<true, true>>(rank, experts)
                 : shared_bytes<ProductMemory<true, false>>(rank, experts);
  }
  return split ? shared_bytes<ProductMemory<false, true>>(rank, experts)
               : shared_bytes<ProductMemory<false, false>>(rank, experts);
}

template <typename T, bool FanInFanOut, bool Split>
void launch_product(const MergeLoraProduct<T>& params, const Device& device) {
  size_t bytes = merge_lora_product_bytes(params.rank, params.a.experts, FanInFanOut, Split);
  launch("merge_lora_product", merge_lora_product_kernel<T, FanInFanOut, Split>,
         {params.blocks(FanInFanOut), kMergeThreads, bytes}, device, params);
}

template <typename T>
void launch_merge_lora_product(const MergeLoraProduct<T>& params, bool fan_in_fan_out, bool split,
                               const Device& device) {
  if (fan_in_fan_out) {
    split ? launch_product<T, true, true>(params, device) : launch_product<T, true, false>(params, device);
  } else {
    split ? launch_product<T, false, true>(params, device) : launch_product<T, false, false>(params, device);
  }
}

template void launch_merge_lora_product(const MergeLoraProduct<half>&, bool, bool, const Device&);
template void launch_merge_lora_product(const MergeLoraProduct<bfloat16>&, bool, bool, const Device&);
#endif

}  // namespace adamix
