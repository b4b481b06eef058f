// Routed LoRA's weight gradients where rows are 16-byte pieces: x and grad_out are read once for all their experts and
// ranks, straight into registers, where 8 x 8 elements at a time are turned.
//
// A block has some columns of one side's wide operand and one share of the rows. Its warps share out the rows, 16 at a
// time, an expert after the other, and load those that the expert serves; their sums are added in the warps' order.
#include "common/launch.h"
#include "common/weight_grad.h"
#include "routed_lora/lora_team.h"
#include "routed_lora/routed_lora.h"

namespace adamix {

// Tiles: of 16 ranks of a group.
template <typename T, int Tiles>
struct LoraGradSums {
  static constexpr int kCols = lora_grad_cols(Tiles);
  static constexpr int kParts = kCols / kStep;  // pieces that a lane has of a row
  static constexpr int kPitch = kCols + 8;
  static constexpr int kSlots = kTeamWarps / 2;
  static constexpr int kSlot = 16 * Tiles * kPitch;
  static constexpr int kDepth = Tiles > 3 ? 1 : 2;  // of 16 rows under way at a time, at most 2

  float* sums;     // [kSlots, 16 * Tiles, kPitch]
  uint32_t* seen;  // [kTeamWarps]

  template <typename Memory>
  ADAMIX_BOTH explicit LoraGradSums(Memory& memory)
      : sums(memory.template take<float>(kSlots * kSlot)), seen(memory.template take<uint32_t>(kTeamWarps)) {}
};

// The rows of the block's share; fewer than one in a share behind the last row.
struct ShareRows {
  int first, end;

  ADAMIX_DEVICE explicit ShareRows(const RowShares& shares) {
    int64_t from = blockIdx.y * shares.rows_a_share;
    int64_t left = shares.rows - from < shares.rows_a_share ? shares.rows - from : shares.rows_a_share;
    first = static_cast<int>(from), end = static_cast<int>(from + left);
  }
};

// The expert whose gradient a row is part of, or kNoExpert.
template <typename T>
ADAMIX_DEVICE int expert_of(const GradSide<T>& side, int row) {
  int expert = side.routing.expert(row);
  return side.other.expert(row) == kNoExpert ? kNoExpert : expert;
}

// Bit e: expert first + e serves rows of the share. All threads call.
template <typename T>
ADAMIX_DEVICE uint32_t experts_seen(uint32_t* seen, const GradSide<T>& side, const ShareRows& rows, int first) {
  uint32_t own = 0;
  for (int row = rows.first + static_cast<int>(threadIdx.x); row < rows.end; row += kTeamThreads) {
    uint32_t at = static_cast<uint32_t>(expert_of(side, row) - first);
    if (at < 32) own |= 1u << at;
  }
  own = warp_reduce(own, Or{});
  __syncthreads();
  if (threadIdx.x % 32 == 0) seen[threadIdx.x / 32] = own;
  __syncthreads();
  own = 0;
#pragma unroll
  for (int warp = 0; warp < kTeamWarps; ++warp) own |= seen[warp];
  return own;
}

// The warp's sums of narrow^T wide over the share's rows that an expert serves: sums[tile][part][word], ranks
// 16 tile + spread(4) and two behind it, columns 32 part + 8 q + 2 word and the next.
template <typename T, int Tiles>
ADAMIX_DEVICE void add_rows(const GradSide<T>& side, const GradJob& job, const ShareRows& rows, const DropoutMask& mask,
                            int expert, float (&sums)[Tiles][LoraGradSums<T, Tiles>::kParts][4][4]) {
  using Sums = LoraGradSums<T, Tiles>;
  constexpr int kParts = Sums::kParts, kDepth = Sums::kDepth;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  int narrow_cols = side.groups * side.ranks;
  const T* narrow = side.narrow + job.group * side.ranks + 4 * q;
  const T* from_wide = side.wide.data + job.col0 + 8 * q;
  for (int first = rows.first + 16 * warp; first < rows.end; first += 16 * kTeamWarps * kDepth) {
    uint4 wide[kDepth][kParts][2];
    uint2 ranks[kDepth][Tiles][2];
    // Lane 16 d + i looks at row i of step d.
    int own = first + 16 * kTeamWarps * (lane / 16) + lane % 16;
    bool looks = lane < 16 * kDepth && own < rows.end;
    uint32_t served = __ballot_sync(0xffffffffu, looks && expert_of(side, own) == expert);
    if (served == 0) continue;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        int row = first + 16 * kTeamWarps * d + 8 * below + g;
        bool kept = served >> (16 * d + 8 * below + g) & 1;
        const T* from = from_wide + side.wide.offset(row);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          bool inside = kept && job.col0 + part * kStep + 8 * q < side.cols;
          wide[d][part][below] = inside ? load_words<uint4>(from + part * kStep) : uint4{0, 0, 0, 0};
        }
        const T* of = narrow + static_cast<int64_t>(row) * narrow_cols;
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          bool ranked = kept && 16 * tile + 4 * q < side.ranks;
          ranks[d][tile][below] = ranked ? load_words<uint2>(of + 16 * tile) : uint2{0, 0};
        }
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if ((served >> (16 * d) & 0xffffu) == 0) continue;
      if (mask.drops()) {
        DropoutMask::RowKeys own = mask.of_row(first + 16 * kTeamWarps * d + lane % 16);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          DropoutMask::EightColumns columns(job.col0 + part * kStep + 8 * q);
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            DropoutMask::RowKeys keys{shuffle_from(own.factor, 8 * below + g), shuffle_from(own.offset, 8 * below + g)};
            wide[d][part][below] = mask.kept(wide[d][part][below], keys, columns);
          }
        }
      }
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

// The block's sums, of the warps in their order, to an expert's gradient or its plane, times `scale`; zeros where no
// row is its own.
template <typename T, int Tiles>
ADAMIX_DEVICE void store_sums(const LoraGradSums<T, Tiles>& team, const GradSide<T>& side, const GradJob& job,
                              const RowShares& shares, float scale, int expert, bool seen,
                              const float (&sums)[Tiles][LoraGradSums<T, Tiles>::kParts][4][4]) {
  using Sums = LoraGradSums<T, Tiles>;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  if (seen) {
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
  }
  float* plane = shares.planes == nullptr ? nullptr : shares.planes + blockIdx.y * shares.plane_size;
  int64_t range = static_cast<int64_t>(expert) * side.groups + job.group;
  for (int i = threadIdx.x; i < Sums::kCols * 16 * Tiles; i += kTeamThreads) {
    // Neighbouring threads write neighbouring elements.
    int c = side.ranks_first ? i % Sums::kCols : i / (16 * Tiles);
    int rank = side.ranks_first ? i / Sums::kCols : i % (16 * Tiles);
    int col = job.col0 + c;
    if (col >= side.cols || rank >= side.ranks) continue;
    float sum = 0.f;
    if (seen) {
#pragma unroll
      for (int slot = 0; slot < Sums::kSlots; ++slot) sum += team.sums[slot * Sums::kSlot + rank * Sums::kPitch + c];
    }
    int64_t at = side.ranks_first ? (range * side.ranks + rank) * side.cols + col
                                  : (range * side.cols + col) * side.ranks + rank;
    store_grad(side.weight, plane, at, scale * sum);
  }
}

template <typename T, int Tiles>
__global__ void __launch_bounds__(kTeamThreads, 2) routed_lora_weight_grad_mma_kernel(RoutedLoraWeightGrad<T> p) {
  if constexpr (kHasFragments<T>) {
    using Sums = LoraGradSums<T, Tiles>;
    SharedMemory memory;
    Sums team(memory);
    int number = blockIdx.x, of_a = lora_grad_jobs(p.a, Tiles);
    bool is_b = number >= of_a;
    GradSide<T> side = is_b ? p.b : p.a;
    if (is_b) number -= of_a;
    int chunks = ceil_div(side.cols, Sums::kCols);
    GradJob job{0, number / chunks, number % chunks * Sums::kCols, 0};
    Dropout dropout = p.dropout;
    if (is_b) {
      side.wide.data += p.ranges.start[job.group];
      dropout.seed = nullptr;
    }
    DropoutMask mask(dropout);
    float scale = is_b ? p.scaling : mask.drops() ? dropout.scale : 1.f;
    ShareRows rows(p.shares);
    uint32_t seen = 0;
    for (int expert = 0; expert < side.experts; ++expert) {
      if (expert % 32 == 0) seen = experts_seen(team.seen, side, rows, expert);
      bool found = seen >> expert % 32 & 1;
      float sums[Tiles][Sums::kParts][4][4] = {};
      if (found) add_rows<T, Tiles>(side, job, rows, mask, expert, sums);
      store_sums<T, Tiles>(team, side, job, p.shares, scale, expert, found, sums);
      if (found) __syncthreads();  // the next expert's sums take this one's place
    }
  }
}

#define ADAMIX_INSTANTIATE(T)                                                                 \
  template __global__ void routed_lora_weight_grad_mma_kernel<T, 1>(RoutedLoraWeightGrad<T>); \
  template __global__ void routed_lora_weight_grad_mma_kernel<T, 2>(RoutedLoraWeightGrad<T>); \
  template __global__ void routed_lora_weight_grad_mma_kernel<T, 3>(RoutedLoraWeightGrad<T>); \
  template __global__ void routed_lora_weight_grad_mma_kernel<T, 4>(RoutedLoraWeightGrad<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_routed_lora_weight_grad_mma(const RoutedLoraWeightGrad<T>& params, const Device& device) {
  auto run = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    dim3 grid(lora_grad_jobs(params.a, kTiles) + lora_grad_jobs(params.b, kTiles), params.shares.count);
    launch("routed_lora_weight_grad_mma", routed_lora_weight_grad_mma_kernel<T, kTiles>,
           {grid, kTeamThreads, shared_bytes<LoraGradSums<T, kTiles>>()}, device, params);
  };
  switch (params.tiles) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    default:
      return run(std::integral_constant<int, 4>{});
  }
}

template void launch_routed_lora_weight_grad_mma(const RoutedLoraWeightGrad<half>&, const Device&);
template void launch_routed_lora_weight_grad_mma(const RoutedLoraWeightGrad<bfloat16>&, const Device&);
#endif

}  // namespace adamix
