// Sorted pairs' t = dropout(x) A^T + bias and results gate * (scale * act(t) B^T + bias); as gated_fwd_mma.cu, a tile
// of one expert at a time.
#include "gated/sorted.h"

namespace adamix {

// Tiles: of 8 columns of t, all groups'.
template <typename T, int Tiles>
struct SortedTeam {
  static constexpr int kHalves = Tiles > 2 ? 1 : 2;         // of 16 rows, that a warp has in the first product
  static constexpr int kShares = kTeamWarps / 2 * kHalves;  // of x's columns
  static constexpr int kDepth = Tiles > 4 ? 1 : 2;          // steps under way at a time
  static constexpr int kPitch = 8 * (Tiles | 1);            // an odd number of 32 bytes: no bank twice

  float* sums;  // [kShares, kTeamRows, kPitch]
  NarrowRows<T> narrow;
  PairTable table;

  template <typename Memory>
  ADAMIX_BOTH SortedTeam(Memory& memory, int groups, int rank)
      : sums(memory.template take<float>(kShares * kTeamRows * kPitch)),
        narrow(memory, groups, rank, 1, 0),
        table(memory) {}
};

// The warp's part of dropout(x) A^T into its place in team.sums.
template <typename T, int Tiles>
ADAMIX_DEVICE void multiply_down(const SortedForward<T>& p, const SortedTeam<T, Tiles>& team, const PairRows<T>& at) {
  using Team = SortedTeam<T, Tiles>;
  constexpr int kDepth = Team::kDepth, kHalves = Team::kHalves, kShares = Team::kShares;
  int ranks = p.ranks(), steps = ceil_div(p.features, kStep);
  int share = kHalves == 1 ? at.warp / 2 : at.warp,
      first = kHalves == 1 ? at.warp % 2 * 2 : 0;  // of the lane's rows
  float sums[kHalves][Tiles][4] = {};
  const T* x[2 * kHalves];
  DropoutMask mask(p.dropout);
  DropoutMask::RowKeys keys[2 * kHalves] = {};
#pragma unroll
  for (int i = 0; i < 2 * kHalves; ++i) {
    int row = at.row_of(at.pair(at.row(first + i)));
    x[i] = p.x.data + p.x.offset(row) + 8 * at.q;
    if (mask.drops()) keys[i] = mask.of_row(row);
  }
  const T* bank = p.down + 8 * at.q + static_cast<int64_t>(at.expert) * ranks * p.features;
  int64_t row_bytes = static_cast<int64_t>(sizeof(T)) * p.features;
  for (int step = share; step < steps; step += kDepth * kShares) {
    uint4 rows[kDepth][2 * kHalves];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int col = (step + d * kShares) * kStep;
      bool inside = col + 8 * at.q < p.features;
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) rows[d][i] = inside ? load_words<uint4>(x[i] + col) : uint4{0, 0, 0, 0};
      if (!mask.drops()) continue;
      DropoutMask::EightColumns columns(col + 8 * at.q);
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) rows[d][i] = mask.kept(rows[d][i], keys[i], columns);
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      // The lanes behind the last rank take that one; their sums are not used.
      int64_t rank = 8 * tile + at.g < ranks ? 8 * tile + at.g : ranks - 1;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        int col = (step + d * kShares) * kStep;
        uint4 b = col + 8 * at.q < p.features ? load_piece_at(bank + col, rank * row_bytes) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          multiply_step<T>(sums[half][tile], rows[d][2 * half], rows[d][2 * half + 1], b);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kHalves; ++i) {
    float* to = team.sums + (share * kTeamRows + at.row(first + i)) * Team::kPitch + 2 * at.q;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const float* from = sums[i / 2][tile] + i % 2 * 2;
      store_words(to + 8 * tile, FloatPair{from[0], from[1]});
    }
  }
}

// t of the tile's pairs = the warps' sums, added in their order: eight threads a pair. Complete after a barrier.
template <typename T, int Tiles>
ADAMIX_DEVICE void add_down(const SortedForward<T>& p, const SortedTeam<T, Tiles>& team, const PairRows<T>& at) {
  constexpr int kShares = SortedTeam<T, Tiles>::kShares, kPitch = SortedTeam<T, Tiles>::kPitch;
  int ranks = p.ranks(), row = at.thread() / 8;
  float scale = p.dropout.seed == nullptr ? 1.f : p.dropout.scale;
  T* to = p.t + static_cast<int64_t>(team.table.pair[row]) * ranks;
#pragma unroll 1
  for (int col = at.thread() % 8 * 2; col < ranks && row < at.count; col += 16) {
    const float* from = team.sums + row * kPitch + col;
    FloatPair sum{};
#pragma unroll
    for (int of = 0; of < kShares; ++of) {
      FloatPair part = load_words<FloatPair>(from + of * kTeamRows * kPitch);
      sum = {sum.low + part.low, sum.high + part.high};
    }
    if (!team.table.served[row]) sum = {not_a_number(), not_a_number()};
    sum = {sum.low * scale, sum.high * scale};
    if (p.down_bias != nullptr) {
      uint32_t bias = load_words<uint32_t>(p.down_bias + static_cast<int64_t>(at.expert) * ranks + col);
      sum = {sum.low + low_of<T>(bias), sum.high + high_of<T>(bias)};
    }
    uint32_t t = word_of<T>(sum.low, sum.high), h = t;
    if (p.activation != Activation::kNone) {
      h = word_of<T>(activate(p.activation, low_of<T>(t)), activate(p.activation, high_of<T>(t)));
    }
    int group = static_cast<int>(p.by_rank.quotient(col));
    store_words(to + col, t);
    store_words(team.narrow.data + row * team.narrow.pitch + group * team.narrow.group_pitch + col - group * p.rank, h);
  }
}

template <typename T, int Tiles>
__global__ void __launch_bounds__(kTeamThreads, 2) gated_sorted_forward_mma_kernel(SortedForward<T> p) {
  if constexpr (kHasFragments<T>) {
    constexpr int kInnerTiles = (Tiles + 1) / 2;  // of 16 columns of t, a group's
    int top = p.order.at[static_cast<int64_t>(blockIdx.x) * kTeamRows];
    if (top < 0) return;
    SharedMemory memory;
    SortedTeam<T, Tiles> team(memory, p.ranges.groups, p.rank);
    PairRows<T> at(p, p.order, top);
    bool known = at.expert != kNoExpert;
    if (!known) at.expert = 0;  // what is made of it is NaN
    team.narrow.clear(at);
    team.table.fill(p, at);
    multiply_down(p, team, at);
    __syncthreads();
    add_down(p, team, at);
    __syncthreads();

    int cols = p.ranges.cols;
    int64_t width = static_cast<int64_t>(p.ranges.groups) * cols;
    const T* bank = p.up + at.expert * width * p.rank + 4 * at.q;
    const T* bias = p.up_bias + static_cast<int64_t>(at.expert) * cols + 8 * at.q;
    T* to[4];
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = p.y + team.table.pair[at.row(i)] * width + 8 * at.q;
      weights[i] = team.table.weights[at.row(i)];
    }
    OutColumns of{0, 0};
    for (of.advance(at.warp * kStep, cols); of.group < p.ranges.groups; of.advance(kTeamWarps * kStep, cols)) {
      bool inside = of.col + 8 * at.q < cols;
      int first = of.col + 4 * at.g < cols ? of.col + 4 * at.g : 0;  // of the lane's four columns of the factor
      const T* weight = bank + (static_cast<int64_t>(of.group) * cols + first) * p.rank;
      uint2 b[kInnerTiles][4];
#pragma unroll
      for (int k = 0; k < kInnerTiles; ++k) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          b[k][n] = 16 * k + 4 * at.q < p.rank ? load_words<uint2>(weight + n * p.rank + 16 * k) : uint2{0, 0};
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float wide[4][4] = {};
        if (p.up_bias != nullptr) {  // of one group; a lane's columns are those of its sums
          uint4 of_cols = inside ? load_words<uint4>(bias + of.col) : uint4{0, 0, 0, 0};
          uint32_t words[4] = {of_cols.x, of_cols.y, of_cols.z, of_cols.w};
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            float value = e % 2 == 0 ? low_of<T>(words[e / 2]) : high_of<T>(words[e / 2]);
            wide[e % 4][e / 4] = value, wide[e % 4][2 + e / 4] = value;
          }
        }
#pragma unroll
        for (int k = 0; k < kInnerTiles; ++k) {
          if (16 * k >= p.rank) break;
          uint2 upper, lower;
          team.narrow.load(at, half, of.group * team.narrow.group_pitch + 16 * k, upper, lower);
#pragma unroll
          for (int n = 0; n < 4; ++n) multiply<T>(wide[n], upper.x, lower.x, upper.y, lower.y, b[k][n].x, b[k][n].y);
        }
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          int i = 2 * half + below;
          // The lane's columns 0 to 3 are its first of each product, 4 to 7 its second.
          auto pair = [&](int n, int e) {
            return word_of<T>(weights[i] * wide[n][2 * below + e], weights[i] * wide[n + 1][2 * below + e]);
          };
          uint4 piece{pair(0, 0), pair(2, 0), pair(0, 1), pair(2, 1)};
          if (inside && at.row(i) < at.count) store_piece_at(to[i] + of.group * cols + of.col, 0, piece);
        }
      }
    }
  }
}

#define ADAMIX_INSTANTIATE(T)                                                       \
  template __global__ void gated_sorted_forward_mma_kernel<T, 2>(SortedForward<T>); \
  template __global__ void gated_sorted_forward_mma_kernel<T, 4>(SortedForward<T>); \
  template __global__ void gated_sorted_forward_mma_kernel<T, 8>(SortedForward<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_sorted_forward(const SortedForward<T>& params, int64_t tiles, const Device& device) {
  auto run = [&](auto number) {
    constexpr int kTiles = decltype(number)::value;
    size_t bytes = shared_bytes<SortedTeam<T, kTiles>>(params.ranges.groups, params.rank);
    launch("gated_sorted_forward_mma", gated_sorted_forward_mma_kernel<T, kTiles>,
           {dim3(static_cast<unsigned>(tiles)), kTeamThreads, bytes}, device, params);
  };
  int ranks = params.ranks();
  if (ranks <= 16) {
    run(std::integral_constant<int, 2>{});
  } else if (ranks <= 32) {
    run(std::integral_constant<int, 4>{});
  } else {
    run(std::integral_constant<int, 8>{});
  }
}

template void launch_sorted_forward(const SortedForward<half>&, int64_t, const Device&);
template void launch_sorted_forward(const SortedForward<bfloat16>&, int64_t, const Device&);
#endif

}  // namespace adamix
