// Sorted pairs' u = grad_out B; from it dt = gate * scale * u, what the gradients of both banks take, that of the gate,
// and dropout'(dt A); with biases and an activation too. As gated_dx_mma.cu, a tile of one expert at a time.
#include "gated/sorted.h"

namespace adamix {

// Tiles: of 16 columns of u, a group's at multiples of 16.
template <typename T, int Tiles>
struct SortedGradTeam {
  static constexpr int kHalves = Tiles > 1 ? 1 : 2;         // of 16 rows, that a warp has in the first product
  static constexpr int kShares = kTeamWarps / 2 * kHalves;  // of a group's columns
  static constexpr int kDepth = 2;                          // steps under way at a time

  int group_pitch, pitch;
  float* sums;           // [kShares, kTeamRows, pitch], a group's columns at multiples of 16
  float* bias_sums;      // [kShares, kTeamRows]: grad_out times the bias up
  NarrowRows<T> narrow;  // dt
  PairTable table;

  template <typename Memory>
  ADAMIX_BOTH SortedGradTeam(Memory& memory, int groups, int rank)
      : group_pitch(round_up(rank, 16)),
        pitch(16 * (groups * ceil_div(rank, 16) | 1)),  // an odd number of 64 bytes: no bank twice
        sums(memory.template take<float>(kShares * kTeamRows * pitch)),
        bias_sums(memory.template take<float>(kShares * kTeamRows)),
        narrow(memory, 1, groups * rank, 1, 0),
        table(memory) {}
};

// The warp's part of a group's grad_out B into its place in team.sums.
template <typename T, int Tiles>
ADAMIX_DEVICE void multiply_up(const SortedInputGrad<T>& p, const SortedGradTeam<T, Tiles>& team, const PairRows<T>& at,
                               int group) {
  using Team = SortedGradTeam<T, Tiles>;
  constexpr int kDepth = Team::kDepth, kHalves = Team::kHalves, kShares = Team::kShares;
  int cols = p.ranges.cols, steps = ceil_div(cols, kStep);
  int share = kHalves == 1 ? at.warp / 2 : at.warp,
      first = kHalves == 1 ? at.warp % 2 * 2 : 0;  // of the lane's rows
  bool biased = p.up_bias != nullptr && p.dgates != nullptr;
  float sums[kHalves][Tiles][2][4] = {}, of_bias[kHalves][2] = {};
  const T* grad[2 * kHalves];
#pragma unroll
  for (int i = 0; i < 2 * kHalves; ++i) {
    int row = at.row_of(at.pair(at.row(first + i)));
    grad[i] = p.grad_out.data + p.grad_out.offset(row) + p.ranges.start[group] + 8 * at.q;
  }
  const T* bank = p.up + (static_cast<int64_t>(at.expert) * p.ranges.groups + group) * cols * p.rank + 4 * at.q;
  for (int step = share; step < steps; step += kDepth * kShares) {
    uint4 rows[kDepth][2 * kHalves];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int col = (step + d * kShares) * kStep;
      bool inside = col + 8 * at.q < cols;
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) rows[d][i] = inside ? load_words<uint4>(grad[i] + col) : uint4{0, 0, 0, 0};
    }
    if (biased) {  // the bias is the first column of eight
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        int col = (step + d * kShares) * kStep + 8 * at.q;
        const T* bias = p.up_bias + static_cast<int64_t>(at.expert) * cols + col;
        uint4 b = at.g == 0 && col < cols ? load_words<uint4>(bias) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          float with[4] = {of_bias[half][0], 0.f, of_bias[half][1], 0.f};
          multiply_step<T>(with, rows[d][2 * half], rows[d][2 * half + 1], b);
          of_bias[half][0] = with[0], of_bias[half][1] = with[2];
        }
      }
    }
    // Columns of the products' second operands: ranks 4 q to 4 q + 3 are a lane's sums.
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      if (16 * tile >= p.rank) break;
      bool ranked = 16 * tile + 4 * at.q < p.rank;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        int col = (step + d * kShares) * kStep + at.spread(8);
        const T* from = bank + static_cast<int64_t>(col) * p.rank + 16 * tile;
        uint2 b[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          b[w] = ranked && col < cols ? load_words<uint2>(from + 2 * w * p.rank) : uint2{0, 0};
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) b[w] = uint2{transposed(b[w].x), transposed(b[w].y)};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const uint4 &upper = rows[d][2 * half], &lower = rows[d][2 * half + 1];
          multiply_step<T>(sums[half][tile][0], upper, lower, {b[0].x, b[1].x, b[2].x, b[3].x});
          multiply_step<T>(sums[half][tile][1], upper, lower, {b[0].y, b[1].y, b[2].y, b[3].y});
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kHalves; ++i) {
    int place = share * kTeamRows + at.row(first + i);
    if (biased && at.q == 0) team.bias_sums[place] = of_bias[i / 2][i % 2];
    float* to = team.sums + place * team.pitch + group * team.group_pitch + 4 * at.q;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      if (16 * tile >= p.rank) break;
      const auto& of = sums[i / 2][tile];
      int e = i % 2 * 2;
      store_words(to + 16 * tile, float4{of[0][e], of[0][e + 1], of[1][e], of[1][e + 1]});
    }
  }
}

// u of the tile's pairs = the warps' sums, added in their order, and what is made of it: eight threads a pair. Complete
// in team.narrow after a barrier.
template <typename T, int Tiles>
ADAMIX_DEVICE void leave_narrow(const SortedInputGrad<T>& p, const SortedGradTeam<T, Tiles>& team,
                                const PairRows<T>& at) {
  int ranks = p.ranks(), row = at.thread() / 8;
  int64_t pair = team.table.pair[row];
  bool inside = row < at.count, good = team.table.served[row] != 0;
  bool activated = p.activation != Activation::kNone;
  float weight = team.table.weights[row], of_gate = 0.f;
#pragma unroll 1
  for (int col = at.thread() % 8 * 2; col < ranks && inside; col += 16) {
    int group = static_cast<int>(p.by_rank.quotient(col));
    FloatPair t{}, sum{};
    if (p.mixed != nullptr || p.dgates != nullptr || activated) {
      uint32_t word = load_words<uint32_t>(p.t + pair * ranks + col);
      t = {low_of<T>(word), high_of<T>(word)};
    }
    FloatPair h = activated ? FloatPair{activate(p.activation, t.low), activate(p.activation, t.high)} : t;
    if (p.mixed != nullptr) {
      store_words(p.mixed + pair * ranks + col, good ? word_of<T>(weight * h.low, weight * h.high) : 0u);
    }
    if (!p.gathers) continue;
    const float* from = team.sums + row * team.pitch + group * team.group_pitch + col - group * p.rank;
#pragma unroll
    for (int of = 0; of < SortedGradTeam<T, Tiles>::kShares; ++of) {
      FloatPair part = load_words<FloatPair>(from + of * kTeamRows * team.pitch);
      sum = {sum.low + part.low, sum.high + part.high};
    }
    of_gate += h.low * sum.low;
    of_gate += h.high * sum.high;
    if (activated) {
      sum = {sum.low * activation_slope(p.activation, t.low), sum.high * activation_slope(p.activation, t.high)};
    }
    uint32_t dt = word_of<T>(weight * sum.low, weight * sum.high);
    if (p.dt != nullptr) store_words(p.dt + pair * ranks + col, good ? dt : 0u);
    store_words(team.narrow.data + row * team.narrow.pitch + col, dt);
  }
  of_gate = warp_reduce<8>(of_gate, Add{});
  bool first = inside && at.lane % 8 == 0;
  if (first && p.bias_gates != nullptr) p.bias_gates[pair] = from_float<T>(good ? weight : 0.f);
  if (first && p.dgates != nullptr) {
#pragma unroll
    for (int of = 0; of < SortedGradTeam<T, Tiles>::kShares && p.up_bias != nullptr; ++of) {
      of_gate += team.bias_sums[of * kTeamRows + row];
    }
    store_scalar(p.dgates, p.dgates_kind, pair, good ? of_gate * team.table.scale[row] : not_a_number());
  }
}

template <typename T, int Tiles>
__global__ void __launch_bounds__(kTeamThreads, 2) gated_sorted_input_grad_mma_kernel(SortedInputGrad<T> p) {
  if constexpr (kHasFragments<T>) {
    int top = p.order.at[static_cast<int64_t>(blockIdx.x) * kTeamRows];
    if (top < 0) return;
    SharedMemory memory;
    SortedGradTeam<T, Tiles> team(memory, p.ranges.groups, p.rank);
    PairRows<T> at(p, p.order, top);
    if (at.expert == kNoExpert) at.expert = 0;  // what is made of it is NaN
    team.narrow.clear(at);
    team.table.fill(p, at);
    for (int group = 0; p.gathers && group < p.ranges.groups; ++group) multiply_up(p, team, at, group);
    __syncthreads();
    leave_narrow(p, team, at);
    if (p.dx == nullptr) return;
    __syncthreads();

    DropoutMask mask(p.dropout);
    DropoutMask::RowKeys keys[4] = {};
    float scale = mask.drops() ? p.dropout.scale : 1.f;
    int ranks = p.ranks(), cols = p.features;
    T* to[4];
    bool good[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int pair = team.table.pair[at.row(i)];
      good[i] = team.table.served[at.row(i)] != 0;
      to[i] = p.dx + static_cast<int64_t>(pair) * cols;
      if (mask.drops()) keys[i] = mask.of_row(at.row_of(pair));
    }
    const T* bank = p.down + static_cast<int64_t>(at.expert) * ranks * cols;
    for (int first = at.warp * kStep; first < cols; first += kTeamWarps * kStep) {
      int col = first + 8 * at.q;
      bool inside = col < cols;
      uint4 a[Tiles][2];
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          int rank = 16 * tile + at.spread(4) + 2 * u;
          const T* from = bank + static_cast<int64_t>(rank) * cols + col;
          a[tile][u] = inside && rank < ranks ? load_words<uint4>(from) : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          uint4& of = a[tile][u];
          of = uint4{transposed(of.x), transposed(of.y), transposed(of.z), transposed(of.w)};
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float wide[4][4] = {};
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          if (16 * tile >= ranks) break;
          uint2 upper, lower;
          team.narrow.load(at, half, 16 * tile, upper, lower);
          const uint4 &even = a[tile][0], &odd = a[tile][1];
          multiply<T>(wide[0], upper.x, lower.x, upper.y, lower.y, even.x, odd.x);
          multiply<T>(wide[1], upper.x, lower.x, upper.y, lower.y, even.y, odd.y);
          multiply<T>(wide[2], upper.x, lower.x, upper.y, lower.y, even.z, odd.z);
          multiply<T>(wide[3], upper.x, lower.x, upper.y, lower.y, even.w, odd.w);
        }
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          int i = 2 * half + below;
          auto word = [&](int n) { return word_of<T>(scale * wide[n][2 * below], scale * wide[n][2 * below + 1]); };
          uint4 piece{word(0), word(1), word(2), word(3)};
          if (mask.drops()) piece = mask.kept(piece, keys[i], DropoutMask::EightColumns(col));
          uint32_t lost = word_of<T>(not_a_number(), not_a_number());
          if (!good[i]) piece = {lost, lost, lost, lost};
          if (inside && at.row(i) < at.count) store_piece_at(to[i] + col, 0, piece);
        }
      }
    }
  }
}

#define ADAMIX_INSTANTIATE(T)                                                            \
  template __global__ void gated_sorted_input_grad_mma_kernel<T, 1>(SortedInputGrad<T>); \
  template __global__ void gated_sorted_input_grad_mma_kernel<T, 2>(SortedInputGrad<T>); \
  template __global__ void gated_sorted_input_grad_mma_kernel<T, 4>(SortedInputGrad<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_sorted_input_grad(const SortedInputGrad<T>& params, int64_t tiles, const Device& device) {
  auto run = [&](auto number) {
    constexpr int kTiles = decltype(number)::value;
    size_t bytes = shared_bytes<SortedGradTeam<T, kTiles>>(params.ranges.groups, params.rank);
    launch("gated_sorted_input_grad_mma", gated_sorted_input_grad_mma_kernel<T, kTiles>,
           {dim3(static_cast<unsigned>(tiles)), kTeamThreads, bytes}, device, params);
  };
  int ranks = params.ranges.groups * round_up(params.rank, 16);
  if (ranks <= 16) {
    run(std::integral_constant<int, 1>{});
  } else if (ranks <= 32) {
    run(std::integral_constant<int, 2>{});
  } else {
    run(std::integral_constant<int, 4>{});
  }
}

template void launch_sorted_input_grad(const SortedInputGrad<half>&, int64_t, const Device&);
template void launch_sorted_input_grad(const SortedInputGrad<bfloat16>&, int64_t, const Device&);
#endif

}  // namespace adamix
