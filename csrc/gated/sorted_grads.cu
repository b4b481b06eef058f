// The weights' gradients of sorted pairs: a block has an expert, some columns of one side's wide operand, and all ranks
// of a group. Its warps share out the expert's pairs, 16 at a time, which are turned in registers, 8 x 8 elements at a
// time; the warps' sums are added in their order.
#include "gated/sorted.h"

namespace adamix {

ADAMIX_BOTH constexpr int sorted_grad_cols(int tiles) { return tiles == 1 ? 64 : 32; }

// Tiles: of 16 ranks of a group. Biased: the biases' gradients are wanted, of one group, and nothing is dropped.
template <int Tiles, bool Biased>
struct SortedGradSums {
  static constexpr int kCols = sorted_grad_cols(Tiles);
  static constexpr int kParts = kCols / kStep;  // pieces that a lane has of a row
  static constexpr int kPitch = kCols + 8;
  static constexpr int kSlots = kTeamWarps / 2;
  static constexpr int kRanks = 16 * Tiles;
  static constexpr int kSlot = (kRanks + Biased) * kPitch;
  static constexpr int kDepth = Tiles > 2 || Biased ? 1 : 2;  // of 16 pairs under way at a time

  float* sums;  // [kSlots, kRanks and one of the bias up, kPitch]

  template <typename Memory>
  ADAMIX_BOTH explicit SortedGradSums(Memory& memory) : sums(memory.template take<float>(kSlots * kSlot)) {}
};

template <typename T>
ADAMIX_BOTH int sorted_grad_jobs(const SortedSide<T>& side, int tiles) {
  return side.narrow == nullptr ? 0 : side.groups * ceil_div(side.cols, sorted_grad_cols(tiles));
}

// The warp's sums of narrow^T wide: sums[tile][part][word], ranks 16 tile + spread(4) and two behind it, columns
// 32 part + 8 q + 2 word and the next; of_bias: of gates^T wide the same columns, in the lanes of g = 0.
template <bool Biased, typename T, int Tiles>
ADAMIX_DEVICE void add_pairs(const SortedSide<T>& side, const T* bias_gates, const PairOrder& order, int group,
                             int col0, int from, int end, const DropoutMask& mask,
                             float (&sums)[Tiles][SortedGradSums<Tiles, Biased>::kParts][4][4],
                             float (&of_bias)[SortedGradSums<Tiles, Biased>::kParts][4][2]) {
  using Sums = SortedGradSums<Tiles, Biased>;
  constexpr int kParts = Sums::kParts, kDepth = Sums::kDepth;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  int narrow_cols = side.groups * side.ranks;
  const T* narrow = side.narrow + group * side.ranks + 4 * q;
  const T* from_wide = side.wide.data + col0 + 8 * q;
  for (int first = from + 16 * warp; first < end; first += 16 * kTeamWarps * kDepth) {
    uint4 wide[kDepth][kParts][2];
    uint2 ranks[kDepth][Tiles][2];
    uint32_t gates[kDepth][2] = {};  // a pair's is the first of eight
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        int at = first + 16 * kTeamWarps * d + 8 * below + g;
        bool there = at < end;
        int pair = there ? order.at[at] : 0, row = static_cast<int>(order.by_slots.quotient(pair));
        const T* of_row = from_wide + side.wide.offset(row);
        const T* of_pair = narrow + static_cast<int64_t>(pair) * narrow_cols;
        DropoutMask::RowKeys keys{};
        if (!Biased && mask.drops()) keys = mask.of_row(row);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          bool inside = there && col0 + part * kStep + 8 * q < side.cols;
          uint4 piece = inside ? load_words<uint4>(of_row + part * kStep) : uint4{0, 0, 0, 0};
          if (!Biased && mask.drops())
            piece = mask.kept(piece, keys, DropoutMask::EightColumns(col0 + part * kStep + 8 * q));
          wide[d][part][below] = piece;
        }
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          bool ranked = there && 16 * tile + 4 * q < side.ranks;
          ranks[d][tile][below] = ranked ? load_words<uint2>(of_pair + 16 * tile) : uint2{0, 0};
        }
        if constexpr (Biased) {
          bool first = bias_gates != nullptr && there && q == 0;
          if (first) gates[d][below] = word_of<T>(to_float(bias_gates[pair]), 0.f);
        }
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      uint32_t a[Tiles][4];
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          a[tile][2 * below] = transposed(ranks[d][tile][below].x);
          a[tile][2 * below + 1] = transposed(ranks[d][tile][below].y);
        }
      }
      if (Biased && bias_gates != nullptr) {
        gates[d][0] = transposed(gates[d][0]), gates[d][1] = transposed(gates[d][1]);
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint4 &upper = wide[d][part][0], &lower = wide[d][part][1];
        auto add = [&](int word, uint32_t of_upper, uint32_t of_lower) {
          uint32_t b0 = transposed(of_upper), b1 = transposed(of_lower);
#pragma unroll
          for (int tile = 0; tile < Tiles; ++tile) {
            multiply<T>(sums[tile][part][word], a[tile][0], a[tile][1], a[tile][2], a[tile][3], b0, b1);
          }
          if constexpr (Biased) {
            if (bias_gates == nullptr) return;
            float (&to)[2] = of_bias[part][word];
            float with[4] = {to[0], to[1], 0.f, 0.f};
            multiply<T>(with, gates[d][0], 0, gates[d][1], 0, b0, b1);
            to[0] = with[0], to[1] = with[1];
          }
        };
        add(0, upper.x, lower.x);
        add(1, upper.y, lower.y);
        add(2, upper.z, lower.z);
        add(3, upper.w, lower.w);
      }
    }
  }
}

// The bias down's gradient, the sums of what is narrow: so many threads a rank. sums: a float for each thread.
template <int Ranks, typename T>
ADAMIX_DEVICE void leave_bias(const SortedSide<T>& side, const PairOrder& order, float* sums, int expert, int from,
                              int end) {
  constexpr int kThreads = kTeamThreads / Ranks;
  __syncthreads();
  int thread = threadIdx.x, rank = thread % Ranks, part = thread / Ranks;
  float sum = 0.f;
  for (int at = from + part; at < end && rank < side.ranks; at += kThreads) {
    sum += to_float(side.narrow[static_cast<int64_t>(order.at[at]) * side.ranks + rank]);
  }
  sums[thread] = sum;
  __syncthreads();
  if (part > 0 || rank >= side.ranks) return;
  for (int of = 1; of < kThreads; ++of) sum += sums[of * Ranks + rank];
  side.bias[static_cast<int64_t>(expert) * side.ranks + rank] = from_float<T>(sum);
}

template <typename T, int Tiles, bool Biased>
__global__ void __launch_bounds__(kTeamThreads, 2) gated_sorted_weight_grad_mma_kernel(SortedWeightGrad<T> p) {
  if constexpr (kHasFragments<T>) {
    using Sums = SortedGradSums<Tiles, Biased>;
    SharedMemory memory;
    Sums team(memory);
    int number = blockIdx.x, expert = blockIdx.y, of_down = sorted_grad_jobs(p.down, Tiles);
    bool is_up = number >= of_down;
    SortedSide<T> side = is_up ? p.up : p.down;
    Dropout dropout = p.dropout;
    if (is_up) number -= of_down, dropout.seed = nullptr;
    int chunks = ceil_div(side.cols, Sums::kCols), group = number / chunks, col0 = number % chunks * Sums::kCols;
    if (is_up) side.wide.data += p.ranges.start[group];
    DropoutMask mask(dropout);
    float sums[Tiles][Sums::kParts][4][4] = {}, of_bias[Sums::kParts][4][2] = {};
    int from = p.order.edges[2 * expert], end = p.order.edges[2 * expert + 1];
    add_pairs<Biased>(side, is_up ? p.bias_gates : nullptr, p.order, group, col0, from, end, mask, sums, of_bias);

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    auto each = [&](auto visit) {
      float* slot = team.sums + warp % Sums::kSlots * Sums::kSlot + (g / 2 * 4 + g % 2) * Sums::kPitch + 8 * q;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int part = 0; part < Sums::kParts; ++part) {
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            const float* own = sums[tile][part][word];
            float* to = slot + 16 * tile * Sums::kPitch + part * kStep + 2 * word;
            visit(to, FloatPair{own[0], own[1]});
            visit(to + 2 * Sums::kPitch, FloatPair{own[2], own[3]});
          }
        }
      }
      if constexpr (Biased) {
        if (!is_up || g > 0) return;
#pragma unroll
        for (int part = 0; part < Sums::kParts; ++part) {
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            const float* own = of_bias[part][word];
            visit(slot + Sums::kRanks * Sums::kPitch + part * kStep + 2 * word, FloatPair{own[0], own[1]});
          }
        }
      }
    };
    if (warp >= Sums::kSlots) each([](float* to, FloatPair own) { store_words(to, own); });
    __syncthreads();
    if (warp < Sums::kSlots) {
      each([](float* to, FloatPair own) {
        FloatPair other = load_words<FloatPair>(to);
        store_words(to, FloatPair{own.low + other.low, own.high + other.high});
      });
    }
    __syncthreads();
    float scale = !Biased && mask.drops() ? dropout.scale : 1.f;
    int64_t range = static_cast<int64_t>(expert) * side.groups + group;
    auto sum_of = [&](int rank, int c) {
      float sum = 0.f;
#pragma unroll
      for (int slot = 0; slot < Sums::kSlots; ++slot) sum += team.sums[slot * Sums::kSlot + rank * Sums::kPitch + c];
      return sum;
    };
    for (int i = threadIdx.x; i < Sums::kCols * Sums::kRanks; i += kTeamThreads) {
      // Neighbouring threads write neighbouring elements.
      int c = side.ranks_first ? i % Sums::kCols : i / Sums::kRanks;
      int rank = side.ranks_first ? i / Sums::kCols : i % Sums::kRanks, col = col0 + c;
      if (col >= side.cols || rank >= side.ranks) continue;
      int64_t at = side.ranks_first ? (range * side.ranks + rank) * side.cols + col
                                    : (range * side.cols + col) * side.ranks + rank;
      side.weight[at] = from_float<T>(scale * sum_of(rank, c));
    }
    if constexpr (Biased) {
      int thread = threadIdx.x;
      if (is_up) {
        if (thread >= Sums::kCols || col0 + thread >= side.cols) return;
        side.bias[static_cast<int64_t>(expert) * side.cols + col0 + thread] =
            from_float<T>(sum_of(Sums::kRanks, thread));
      } else if (col0 == 0) {
        leave_bias<Sums::kRanks>(side, p.order, team.sums, expert, from, end);
      }
    }
  }
}

#define ADAMIX_INSTANTIATE(T)                                                                     \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 1, false>(SortedWeightGrad<T>); \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 2, false>(SortedWeightGrad<T>); \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 4, false>(SortedWeightGrad<T>); \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 1, true>(SortedWeightGrad<T>);  \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 2, true>(SortedWeightGrad<T>);  \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 4, true>(SortedWeightGrad<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_sorted_weight_grad(const SortedWeightGrad<T>& params, const Device& device) {
  auto run = [&](auto number, auto biased) {
    constexpr bool kBiased = decltype(biased)::value;
    constexpr int kTiles = decltype(number)::value;
    dim3 grid(sorted_grad_jobs(params.down, kTiles) + sorted_grad_jobs(params.up, kTiles), params.experts);
    launch("gated_sorted_weight_grad_mma", gated_sorted_weight_grad_mma_kernel<T, kTiles, kBiased>,
           {grid, kTeamThreads, shared_bytes<SortedGradSums<kTiles, kBiased>>()}, device, params);
  };
  int ranks = 0;
  for (const SortedSide<T>* side : {&params.down, &params.up}) {
    if (side->narrow != nullptr) ranks = max_of(ranks, side->ranks);
  }
  auto run_of = [&](auto biased) {
    if (ranks <= 16) {
      run(std::integral_constant<int, 1>{}, biased);
    } else if (ranks <= 32) {
      run(std::integral_constant<int, 2>{}, biased);
    } else {
      run(std::integral_constant<int, 4>{}, biased);
    }
  };
  if (params.down.bias != nullptr || params.up.bias != nullptr) {
    run_of(std::true_type{});
  } else {
    run_of(std::false_type{});
  }
}

template void launch_sorted_weight_grad(const SortedWeightGrad<half>&, const Device&);
template void launch_sorted_weight_grad(const SortedWeightGrad<bfloat16>&, const Device&);
#endif

}  // namespace adamix
