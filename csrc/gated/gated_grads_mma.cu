// The weights' gradients with gates where rows are 16-byte pieces: x and grad_out are multiplied by what is narrow of
// all experts at once, straight from memory, 8 x 8 elements at a time turned in registers.
//
// A block has some columns of one side's wide operand, kChunkRanks narrow ones and one share of the rows. Its warps
// share out the rows, 16 at a time, and their sums are added in the warps' order. One large block of twice as many
// warps serves where two would run side by side, for half the shares to be added.
#include "gated/gated_team.h"

namespace adamix {

template <int Warps>
struct GatedGradSums {
  static constexpr int kTiles = kChunkRanks / 16;
  static constexpr int kPitch = kGatedGradCols + 8;
  static constexpr int kSlots = Warps / 2;
  static constexpr int kSlot = kChunkRanks * kPitch;
  static constexpr int kDepth = 2;  // of 16 rows under way at a time

  float* sums;  // [kSlots, kChunkRanks, kPitch]

  template <typename Memory>
  ADAMIX_BOTH explicit GatedGradSums(Memory& memory) : sums(memory.template take<float>(kSlots * kSlot)) {}
};

// What one block computes: columns col0 on of the wide rows, narrow columns rank0 on of `ranks`, which lie from
// `narrow` on, pitch apart.
template <typename T>
struct GatedGradJob {
  bool up;
  int group, col0, rank0, cols, ranks, pitch;
  const T* narrow;
  const T* wide;
  int64_t stride;  // of the wide rows, which are all as far apart

  ADAMIX_DEVICE GatedGradJob(const GatedTeamGrad<T>& p, int number) {
    int of_down = p.down_jobs();
    up = number >= of_down;
    if (up) number -= of_down;
    int chunks = ceil_div(up ? p.up_ranks() : p.down_ranks(), kChunkRanks);
    const Rows<const T>& rows = up ? p.grad_out : p.x;
    wide = rows.data, stride = rows.tokens.by > 1 ? rows.token_stride : rows.batch_stride;
    cols = up ? p.ranges.cols : p.features, ranks = up ? p.up_ranks() : p.down_ranks();
    int parts = ceil_div(cols, kGatedGradCols);
    col0 = number % parts * kGatedGradCols, number /= parts;
    rank0 = number % chunks * kChunkRanks, group = number / chunks;
    pitch = up ? p.mixed_pitch : p.down_ranks();
    narrow = up ? p.mixed + group * p.gates.up.experts * p.rank : p.dt;
    if (up) wide += p.ranges.start[group];
  }
};

// 16 kDepth rows' part of a warp's sums, of which row `first` + g is at wide_at and narrow_at; Whole: all are above
// `end`.
template <int Warps, bool Whole, typename T>
ADAMIX_DEVICE void add_some_rows(const GatedGradJob<T>& job, const T* wide_at, const T* narrow_at, int first, int end,
                                 const DropoutMask& mask, float (&sums)[GatedGradSums<Warps>::kTiles][4][4]) {
  using Sums = GatedGradSums<Warps>;
  constexpr int kDepth = Sums::kDepth;
  int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  int tiles = ceil_div(job.ranks - job.rank0, 16), col = job.col0 + 8 * q;
  uint4 wide[kDepth][2];
  uint2 ranks[kDepth][Sums::kTiles][2];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      int behind = 16 * Warps * d + 8 * below;
      bool kept = Whole || first + behind + g < end;
      wide[d][below] = kept && col < job.cols ? load_words<uint4>(wide_at + behind * job.stride) : uint4{0, 0, 0, 0};
      const T* of = narrow_at + behind * static_cast<int64_t>(job.pitch);
#pragma unroll
      for (int tile = 0; tile < Sums::kTiles; ++tile) {
        bool ranked = kept && job.rank0 + 16 * tile + 4 * q < job.ranks;
        ranks[d][tile][below] = ranked ? load_words<uint2>(of + 16 * tile) : uint2{0, 0};
      }
    }
  }
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (mask.drops()) {
      DropoutMask::EightColumns columns(col);
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        wide[d][below] = mask.kept(wide[d][below], mask.of_row(first + 16 * Warps * d + 8 * below + g), columns);
      }
    }
    const uint4 &upper = wide[d][0], &lower = wide[d][1];
    uint32_t b[4][2] = {{transposed(upper.x), transposed(lower.x)},
                        {transposed(upper.y), transposed(lower.y)},
                        {transposed(upper.z), transposed(lower.z)},
                        {transposed(upper.w), transposed(lower.w)}};
#pragma unroll
    for (int tile = 0; tile < Sums::kTiles; ++tile) {
      if (tile >= tiles) break;
      const uint2 &top = ranks[d][tile][0], &bottom = ranks[d][tile][1];
      uint32_t a[4] = {transposed(top.x), transposed(top.y), transposed(bottom.x), transposed(bottom.y)};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        multiply<T>(sums[tile][word], a[0], a[1], a[2], a[3], b[word][0], b[word][1]);
      }
    }
  }
}

// The warp's sums: sums[tile][word], ranks 16 tile + spread(4) and two behind it, columns 8 q + 2 word and the next.
template <int Warps, typename T>
ADAMIX_DEVICE void add_rows(const GatedGradJob<T>& job, int first_row, int end, const DropoutMask& mask,
                            float (&sums)[GatedGradSums<Warps>::kTiles][4][4]) {
  constexpr int kDepth = GatedGradSums<Warps>::kDepth, kRows = 16 * Warps * kDepth;
  int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, first = first_row + static_cast<int>(threadIdx.x) / 32 * 16;
  const T* wide_at = job.wide + (first + g) * job.stride + job.col0 + 8 * q;
  const T* narrow_at = job.narrow + (first + g) * static_cast<int64_t>(job.pitch) + job.rank0 + 4 * q;
  auto advance = [&] {
    first += kRows, wide_at += kRows * job.stride, narrow_at += kRows * static_cast<int64_t>(job.pitch);
  };
#pragma unroll 1
  for (; first + kRows - 16 * Warps + 16 <= end; advance()) {
    add_some_rows<Warps, true>(job, wide_at, narrow_at, first, end, mask, sums);
  }
#pragma unroll 1
  for (; first < end; advance()) add_some_rows<Warps, false>(job, wide_at, narrow_at, first, end, mask, sums);
}

// One element's sum over the rows of the share that name its expert alone: no other row's infinities are in it.
template <typename T>
ADAMIX_DEVICE float sum_of_named(const GatedTeamGrad<T>& p, const GatedGradJob<T>& job, int first, int end,
                                 const DropoutMask& mask, int expert, int rank, int col) {
  const SlotExperts& side = job.up ? p.gates.up : p.gates.down;
  float sum = 0.f;
  for (int row = first; row < end; ++row) {
    int64_t at = p.gates.at(row);
    bool named = false;
    for (int slot = 0; slot < p.gates.slots; ++slot) named = named || side.named(at + slot, slot) == expert;
    if (!named || !p.gates.served(at)) continue;
    float wide = to_float(job.wide[row * job.stride + col]);
    if (mask.drops()) wide = mask.apply(wide, row, col);
    sum += wide * to_float(job.narrow[static_cast<int64_t>(row) * job.pitch + rank]);
  }
  return sum;
}

template <typename T, int Warps>
__global__ void __launch_bounds__(32 * Warps, 2 * kTeamWarps / Warps) gated_weight_grad_mma_kernel(GatedTeamGrad<T> p) {
  if constexpr (kHasFragments<T>) {
    using Sums = GatedGradSums<Warps>;
    constexpr int kThreads = 32 * Warps;
    SharedMemory memory;
    Sums team(memory);
    GatedGradJob<T> job(p, blockIdx.x);
    Dropout dropout = p.dropout;
    if (job.up) dropout.seed = nullptr;
    DropoutMask mask(dropout);
    int64_t from = blockIdx.y * p.shares.rows_a_share;
    int64_t left = p.shares.rows - from < p.shares.rows_a_share ? p.shares.rows - from : p.shares.rows_a_share;
    int first = static_cast<int>(from), end = static_cast<int>(from + left);
    float* plane = p.shares.planes == nullptr ? nullptr : p.shares.planes + blockIdx.y * p.shares.plane_size;
    float sums[Sums::kTiles][4][4] = {};
    add_rows<Warps>(job, first, end, mask, sums);

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    auto each = [&](auto visit) {
      float* slot = team.sums + warp % Sums::kSlots * Sums::kSlot + (g / 2 * 4 + g % 2) * Sums::kPitch + 8 * q;
#pragma unroll
      for (int tile = 0; tile < Sums::kTiles; ++tile) {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const float* own = sums[tile][word];
          float* to = slot + 16 * tile * Sums::kPitch + 2 * word;
          visit(to, FloatPair{own[0], own[1]});
          visit(to + 2 * Sums::kPitch, FloatPair{own[2], own[3]});
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
    const SlotExperts& side = job.up ? p.gates.up : p.gates.down;
    int weights = side.experts * p.rank;  // of a group of up; behind them the biases
    for (int i = threadIdx.x; i < kGatedGradCols * kChunkRanks; i += kThreads) {
      // Neighbouring threads write neighbouring elements.
      int c = job.up ? i / kChunkRanks : i % kGatedGradCols, of = job.up ? i % kChunkRanks : i / kGatedGradCols;
      int col = job.col0 + c, rank = job.rank0 + of;
      if (col >= job.cols || rank >= job.ranks) continue;
      bool bias = job.up && rank >= weights;
      int expert =
          bias ? rank - weights : static_cast<int>(job.up ? p.by_rank.quotient(rank) : p.by_ranks.quotient(rank));
      float sum = 0.f;
#pragma unroll
      for (int slot = 0; slot < Sums::kSlots; ++slot) sum += team.sums[slot * Sums::kSlot + of * Sums::kPitch + c];
      sum *= scale;
      if (side.differ() && !(sum - sum == 0.f)) sum = sum_of_named(p, job, first, end, mask, expert, rank, col);
      if (!job.up) {
        store_grad(p.down, plane, static_cast<int64_t>(rank) * job.cols + col, sum);
      } else if (bias) {
        store_grad(p.up_bias, plane, static_cast<int64_t>(expert) * job.cols + col, sum);
      } else {
        int64_t range = static_cast<int64_t>(expert) * p.ranges.groups + job.group;
        store_grad(p.up, plane, (range * job.cols + col) * p.rank + rank - expert * p.rank, sum);
      }
    }
    if (job.up || job.col0 > 0 || p.down_bias.out == nullptr) return;
    __syncthreads();
    int of = threadIdx.x % kChunkRanks, part = threadIdx.x / kChunkRanks, rank = job.rank0 + of;
    float sum = 0.f;
    for (int row = first + part; row < end && rank < job.ranks; row += kThreads / kChunkRanks) {
      sum += to_float(job.narrow[static_cast<int64_t>(row) * job.pitch + rank]);
    }
    team.sums[threadIdx.x] = sum;
    __syncthreads();
    if (part > 0 || rank >= job.ranks) return;
#pragma unroll
    for (int other = 1; other < kThreads / kChunkRanks; ++other) sum += team.sums[other * kChunkRanks + of];
    store_grad(p.down_bias, plane, rank, sum);
  }
}

#define ADAMIX_INSTANTIATE(T)                                                             \
  template __global__ void gated_weight_grad_mma_kernel<T, kTeamWarps>(GatedTeamGrad<T>); \
  template __global__ void gated_weight_grad_mma_kernel<T, 2 * kTeamWarps>(GatedTeamGrad<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
size_t gated_large_block_bytes() { return shared_bytes<GatedGradSums<2 * kTeamWarps>>(); }

template <typename T>
void launch_gated_weight_grad_mma(const GatedTeamGrad<T>& params, const Device& device) {
  dim3 grid(params.down_jobs() + params.up_jobs(), params.shares.count);
  auto run = [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    Shape shape{grid, 32 * kWarps, shared_bytes<GatedGradSums<kWarps>>()};
    launch("gated_weight_grad_mma", gated_weight_grad_mma_kernel<T, kWarps>, shape, device, params);
  };
  if (params.large) {
    run(std::integral_constant<int, 2 * kTeamWarps>{});
  } else {
    run(std::integral_constant<int, kTeamWarps>{});
  }
}

template void launch_gated_weight_grad_mma(const GatedTeamGrad<half>&, const Device&);
template void launch_gated_weight_grad_mma(const GatedTeamGrad<bfloat16>&, const Device&);
#endif

}  // namespace adamix
