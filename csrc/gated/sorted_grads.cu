// The weights' gradients of sorted pairs: a block has an expert, some columns of one side's wide operand, and all ranks
// of a group. Its warps share out the expert's pairs, 16 at a time, which are turned in registers, 8 x 8 elements at a
// time; the warps' sums are added in their order.
#include "gated/sorted.h"

namespace adamix {

ADAMIX_BOTH constexpr int sorted_grad_cols(int tiles) { return tiles == 1 ? 64 : 32; }

// Tiles: of 16 ranks of a group, and one more where the bias up is summed: its gates are ranks there, the first of 16.
template <int Tiles>
struct SortedGradSums {
  static constexpr int kCols = sorted_grad_cols(Tiles);
  static constexpr int kParts = kCols / kStep;  // pieces that a lane has of a row
  static constexpr int kPitch = kCols + 8;
  static constexpr int kSlots = kTeamWarps / 2;
  static constexpr int kSlot = 16 * Tiles * kPitch;
  static constexpr int kDepth = Tiles > 2 ? 1 : 2;  // of 16 pairs under way at a time

  float* sums;  // [kSlots, 16 * Tiles, kPitch]

  template <typename Memory>
  ADAMIX_BOTH explicit SortedGradSums(Memory& memory) : sums(memory.template take<float>(kSlots * kSlot)) {}
};

template <typename T>
ADAMIX_BOTH int sorted_grad_jobs(const SortedSide<T>& side, int tiles) {
  return side.narrow == nullptr ? 0 : side.groups * ceil_div(side.cols, sorted_grad_cols(tiles));
}

// The warp's sums of narrow^T wide: sums[tile][part][word], ranks 16 tile + spread(4) and two behind it, columns
// 32 part + 8 q + 2 word and the next.
template <int Biased, typename T, int Tiles>
ADAMIX_DEVICE void add_pairs(const SortedSide<T>& side, const T* bias_gates, const PairOrder& order, int group,
                             int col0, int from, int end, const DropoutMask& mask,
                             float (&sums)[Tiles][SortedGradSums<Tiles>::kParts][4][4]) {
  using Sums = SortedGradSums<Tiles>;
  constexpr int kParts = Sums::kParts, kDepth = Sums::kDepth;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  int narrow_cols = side.groups * side.ranks;
  const T* narrow = side.narrow + group * side.ranks + 4 * q;
  const T* from_wide = side.wide.data + col0 + 8 * q;
  for (int first = from + 16 * warp; first < end; first += 16 * kTeamWarps * kDepth) {
    uint4 wide[kDepth][kParts][2];
    uint2 ranks[kDepth][Tiles][2];
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
        if (mask.drops()) keys = mask.of_row(row);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          bool inside = there && col0 + part * kStep + 8 * q < side.cols;
          uint4 piece = inside ? load_words<uint4>(of_row + part * kStep) : uint4{0, 0, 0, 0};
          if (mask.drops()) piece = mask.kept(piece, keys, DropoutMask::EightColumns(col0 + part * kStep + 8 * q));
          wide[d][part][below] = piece;
        }
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          bool ranked = there && 16 * tile + 4 * q < side.ranks && tile < Tiles - Biased;
          ranks[d][tile][below] = ranked ? load_words<uint2>(of_pair + 16 * tile) : uint2{0, 0};
        }
        if (Biased > 0 && bias_gates != nullptr && there && q == 0) {
          ranks[d][Tiles - 1][below].x = word_of<T>(to_float(bias_gates[pair]), 0.f);
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
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint4 &upper = wide[d][part][0], &lower = wide[d][part][1];
        auto add = [&](int word, uint32_t of_upper, uint32_t of_lower) {
          uint32_t b0 = transposed(of_upper), b1 = transposed(of_lower);
#pragma unroll
          for (int tile = 0; tile < Tiles; ++tile) {
            multiply<T>(sums[tile][part][word], a[tile][0], a[tile][1], a[tile][2], a[tile][3], b0, b1);
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

template <typename T, int Tiles, int Biased>
__global__ void __launch_bounds__(kTeamThreads, Tiles > 4 ? 1 : 2)
    gated_sorted_weight_grad_mma_kernel(SortedWeightGrad<T> p) {
  if constexpr (kHasFragments<T>) {
    using Sums = SortedGradSums<Tiles>;
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
    float sums[Tiles][Sums::kParts][4][4] = {};
    int from = p.order.edges[2 * expert], end = p.order.edges[2 * expert + 1];
    add_pairs<Biased>(side, is_up ? p.bias_gates : nullptr, p.order, group, col0, from, end, mask, sums);

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
    float scale = mask.drops() ? dropout.scale : 1.f;
    int64_t range = static_cast<int64_t>(expert) * side.groups + group;
    for (int i = threadIdx.x; i < Sums::kCols * 16 * Tiles; i += kTeamThreads) {
      // Neighbouring threads write neighbouring elements.
      int c = side.ranks_first ? i % Sums::kCols : i / (16 * Tiles);
      int rank = side.ranks_first ? i / Sums::kCols : i % (16 * Tiles), col = col0 + c;
      bool bias = Biased > 0 && is_up && rank == 16 * (Tiles - 1);
      if (col >= side.cols || (rank >= side.ranks && !bias)) continue;
      float sum = 0.f;
#pragma unroll
      for (int slot = 0; slot < Sums::kSlots; ++slot) sum += team.sums[slot * Sums::kSlot + rank * Sums::kPitch + c];
      int64_t at = side.ranks_first ? (range * side.ranks + rank) * side.cols + col
                                    : (range * side.cols + col) * side.ranks + rank;
      if (bias) {
        side.bias[static_cast<int64_t>(expert) * side.cols + col] = from_float<T>(sum);
      } else {
        side.weight[at] = from_float<T>(scale * sum);
      }
    }
    if (Biased == 0 || is_up || col0 > 0) return;
    // Of the bias down, the sums of what is narrow: so many threads a rank.
    constexpr int kRanks = 16 * (Tiles - Biased), kThreads = kTeamThreads / kRanks;
    __syncthreads();
    int rank = threadIdx.x % kRanks, part = threadIdx.x / kRanks;
    float sum = 0.f;
    for (int at = from + part; at < end && rank < side.ranks; at += kThreads) {
      sum += to_float(side.narrow[static_cast<int64_t>(p.order.at[at]) * side.ranks + rank]);
    }
    team.sums[threadIdx.x] = sum;
    __syncthreads();
    if (part > 0 || rank >= side.ranks) return;
    for (int of = 1; of < kThreads; ++of) sum += team.sums[of * kRanks + rank];
    side.bias[static_cast<int64_t>(expert) * side.ranks + rank] = from_float<T>(sum);
  }
}

#define ADAMIX_INSTANTIATE(T)                                                                 \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 1, 0>(SortedWeightGrad<T>); \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 2, 0>(SortedWeightGrad<T>); \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 4, 0>(SortedWeightGrad<T>); \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 2, 1>(SortedWeightGrad<T>); \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 3, 1>(SortedWeightGrad<T>); \
  template __global__ void gated_sorted_weight_grad_mma_kernel<T, 5, 1>(SortedWeightGrad<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_sorted_weight_grad(const SortedWeightGrad<T>& params, const Device& device) {
  auto run = [&](auto number, auto biased) {
    constexpr int kBiased = decltype(biased)::value, kTiles = decltype(number)::value + kBiased;
    dim3 grid(sorted_grad_jobs(params.down, kTiles) + sorted_grad_jobs(params.up, kTiles), params.experts);
    launch("gated_sorted_weight_grad_mma", gated_sorted_weight_grad_mma_kernel<T, kTiles, kBiased>,
           {grid, kTeamThreads, shared_bytes<SortedGradSums<kTiles>>()}, device, params);
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
    run_of(std::integral_constant<int, 1>{});
  } else {
    run_of(std::integral_constant<int, 0>{});
  }
}

template void launch_sorted_weight_grad(const SortedWeightGrad<half>&, const Device&);
template void launch_sorted_weight_grad(const SortedWeightGrad<bfloat16>&, const Device&);
#endif

}  // namespace adamix
