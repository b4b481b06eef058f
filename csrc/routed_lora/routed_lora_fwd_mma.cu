// Routed LoRA's forward where rows are 16-byte pieces: no operand passes through shared memory.
//
// First product: the warps share out x's columns, each lane loads 16 bytes of a row straight into an operand's
// registers, and the warps' sums are added in their order. Second: the warps share out the output's columns; a lane has
// eight neighbouring ones. Base and x are read once, whatever number of experts serves the rows.
#include "common/launch.h"
#include "routed_lora/lora_team.h"
#include "routed_lora/routed_lora.h"

namespace adamix {

// Tiles: of 8 columns of t, all groups'.
template <typename T, int Tiles>
struct LoraTeam {
  static constexpr int kHalves = Tiles > 2 ? 1 : 2;         // of 16 rows, that a warp has in the first product
  static constexpr int kShares = kTeamWarps / 2 * kHalves;  // of x's columns
  static constexpr int kDepth = Tiles > 4 ? 1 : 2;          // steps under way at a time
  static constexpr int kPitch = 8 * (Tiles | 1);            // an odd number of 32 bytes: no bank twice
  static constexpr int kInnerTiles = (Tiles + 1) / 2;       // of 16 columns of t, a group's

  float* sums;  // [kShares, kTeamRows, kPitch]
  NarrowRows<T> narrow;
  int* wide_expert;  // [kTeamRows]

  template <typename Memory>
  ADAMIX_BOTH LoraTeam(Memory& memory, int groups, int rank, int teams, int team)
      : sums(memory.template take<float>(teams * kShares * kTeamRows * kPitch) + team * kShares * kTeamRows * kPitch),
        narrow(memory, groups, rank, teams, team),
        wide_expert(memory.template take<int>(teams * kTeamRows) + team * kTeamRows) {}
};

// The warp's part of dropout(x) A^T into its place in team.sums, and the rows' wide experts; complete after a barrier.
// Warps that load the same weights are neighbours. x is asked for before the ids are known.
template <typename T, int Tiles>
ADAMIX_DEVICE void multiply_share(const RoutedLoraForward<T>& p, const LoraTeam<T, Tiles>& team, const LaneRows& at) {
  using Team = LoraTeam<T, Tiles>;
  constexpr int kDepth = Team::kDepth, kHalves = Team::kHalves, kShares = Team::kShares;
  int ranks = p.ranges.groups * p.rank, steps = ceil_div(p.features, kStep);
  int share = kHalves == 1 ? at.warp / 2 : at.warp, first = kHalves == 1 ? at.warp % 2 * 2 : 0;  // of the lane's rows
  float sums[kHalves][Tiles][4] = {};
  const T* x[2 * kHalves];
#pragma unroll
  for (int i = 0; i < 2 * kHalves; ++i) x[i] = p.x.data + p.x.offset(at.number(first + i)) + 8 * at.q;
  DropoutMask mask(p.dropout);
  DropoutMask::RowKeys own{};  // of row `lane`
  if (mask.drops()) own = mask.of_row(at.first + at.lane);
  TeamExperts experts;
  for (int step = share; step < steps; step += kDepth * kShares) {
    uint4 rows[kDepth][2 * kHalves];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int col = (step + d * kShares) * kStep;
      bool inside = col + 8 * at.q < p.features;
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) rows[d][i] = inside ? load_words<uint4>(x[i] + col) : uint4{0, 0, 0, 0};
    }
    if (step == share) {
      LaneRouting routing(at, p.a, p.b);
      experts = TeamExperts(routing.narrow, at);
      if (at.warp == 0) team.wide_expert[at.lane] = routing.wide;
    }
    if (mask.drops()) {
      DropoutMask::RowKeys keys[2 * kHalves];
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) {
        keys[i] = {shuffle_from(own.factor, at.row(first + i)), shuffle_from(own.offset, at.row(first + i))};
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        DropoutMask::EightColumns columns((step + d * kShares) * kStep + 8 * at.q);
#pragma unroll
        for (int i = 0; i < 2 * kHalves; ++i) rows[d][i] = mask.kept(rows[d][i], keys[i], columns);
      }
    }
    int64_t row_bytes = static_cast<int64_t>(sizeof(T)) * p.features;
    forget(row_bytes);
    auto multiply = [&](int expert, int tile, auto sums_of) {
      // The lanes behind the last row take that one; their sums are not used.
      int64_t row = static_cast<int64_t>(expert) * ranks + (8 * tile + at.g < ranks ? 8 * tile + at.g : ranks - 1);
      const T* weight = p.lora_a + step * kStep + 8 * at.q;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        bool inside = (step + d * kShares) * kStep + 8 * at.q < p.features;
        const T* from = weight + d * kShares * kStep;
        uint4 b = inside ? load_piece_at(from, row * row_bytes) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          multiply_step<T>(sums_of(half), rows[d][2 * half], rows[d][2 * half + 1], b);
        }
      }
    };
    if (experts.one) {
      if (experts.lowest == kNoExpert) continue;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        multiply(experts.lowest, tile, [&](int half) -> float (&)[4] { return sums[half][tile]; });
      }
      continue;
    }
    for (int expert = experts.lowest; expert != kNoExpert; expert = experts.after(expert)) {
      bool mine[2 * kHalves];
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) mine[i] = experts.of_row(at.row(first + i)) == expert;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        float own[kHalves][4] = {};
        multiply(expert, tile, [&](int half) -> float (&)[4] { return own[half]; });
#pragma unroll
        for (int e = 0; e < 4 * kHalves; ++e) {
          if (mine[e / 2]) sums[e / 4][tile][e % 4] += own[e / 4][e % 4];
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

// t of the team's rows = the warps' sums, added in their order; complete in team.narrow after a barrier.
template <typename T, int Tiles>
ADAMIX_DEVICE void add_shares(const RoutedLoraForward<T>& p, const LoraTeam<T, Tiles>& team, const LaneRows& at) {
  constexpr int kShares = LoraTeam<T, Tiles>::kShares, kPitch = LoraTeam<T, Tiles>::kPitch;
  int ranks = p.ranges.groups * p.rank;
  float scale = p.dropout.seed == nullptr ? 1.f : p.dropout.scale;
#pragma unroll
  for (int pair = at.thread(); pair < kTeamRows * 4 * Tiles; pair += kTeamThreads) {
    int row = pair / (4 * Tiles), col = pair % (4 * Tiles) * 2;
    if (row >= at.count || col >= ranks) continue;
    const float* from = team.sums + row * kPitch + col;
    FloatPair sum{};
#pragma unroll
    for (int of = 0; of < kShares; ++of) {
      FloatPair part = load_words<FloatPair>(from + of * kTeamRows * kPitch);
      sum = {sum.low + part.low, sum.high + part.high};
    }
    if (team.wide_expert[row] == kNoExpert) sum = {not_a_number(), not_a_number()};
    uint32_t t = word_of<T>(sum.low * scale, sum.high * scale);
    int group = col / p.rank;
    store_words(p.t + (at.first + row) * ranks + col, t);
    store_words(team.narrow.data + row * team.narrow.pitch + group * team.narrow.group_pitch + col - group * p.rank, t);
  }
}

template <typename T, int Tiles>
__global__ void __launch_bounds__(2 * kTeamThreads, 1) routed_lora_forward_mma_kernel(RoutedLoraForward<T> p) {
  if constexpr (kHasFragments<T>) {
    constexpr int kInnerTiles = LoraTeam<T, Tiles>::kInnerTiles;
    SharedMemory memory;
    LaneRows at(p.rows);
    LoraTeam<T, Tiles> team(memory, p.ranges.groups, p.rank, at.teams, at.team);
    team.narrow.clear(at);
    multiply_share(p, team, at);

    int cols = p.ranges.cols;
    const T* base[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      base[i] = p.base.data == nullptr ? nullptr : p.base.data + p.base.offset(at.number(i)) + 8 * at.q;
    }
    T* out = p.out + (at.first + at.g) * p.width + 8 * at.q;
    int64_t rows_apart = static_cast<int64_t>(8 * sizeof(T)) * p.width;
    auto load_base = [&](const OutColumns& of, uint4(&pieces)[4]) {
      bool wanted = base[0] != nullptr && of.group < p.ranges.groups && of.col + 8 * at.q < cols;
      int64_t bytes = wanted ? static_cast<int64_t>(sizeof(T)) * (p.ranges.start[of.group] + of.col) : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) pieces[i] = wanted ? load_piece_at(base[i], bytes) : uint4{0, 0, 0, 0};
    };
    OutColumns of{0, 0};
    of.advance(at.warp * kStep, cols);
    constexpr bool kAhead = Tiles <= 4;  // registers for the next pieces of base
    uint4 next[4];
    if (kAhead) load_base(of, next);
    __syncthreads();
    add_shares(p, team, at);
    TeamExperts wide_experts(team.wide_expert[at.lane], at);
    int who[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) who[i] = team.wide_expert[at.row(i)];
    __syncthreads();

    while (of.group < p.ranges.groups) {
      OutColumns now = of;
      if (!kAhead) load_base(now, next);
      uint4 old[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) old[i] = next[i];
      of.advance(kTeamWarps * kStep, cols);
      if (kAhead) load_base(of, next);
      bool inside = now.col + 8 * at.q < cols;
      T* to = out + p.ranges.start[now.group] + now.col;
      auto store = [&](int i, uint4 piece) {
        if (inside && at.row(i) < at.count) store_piece_at(to, i * rows_apart, piece);
      };
      int first = now.col + 4 * at.g < cols ? now.col + 4 * at.g : 0;  // of the lane's four columns of the factor
      for (int expert = wide_experts.lowest; expert != kNoExpert; expert = wide_experts.after(expert)) {
        const T* weight = p.lora_b + 4 * at.q;
        weight += ((static_cast<int64_t>(expert) * p.ranges.groups + now.group) * cols + first) * p.rank;
        uint2 b[kInnerTiles][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) forget(old[i]);
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
#pragma unroll
          for (int k = 0; k < kInnerTiles; ++k) {
            if (16 * k >= p.rank) break;
            uint2 upper, lower;
            team.narrow.load(at, half, now.group * team.narrow.group_pitch + 16 * k, upper, lower);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              multiply<T>(wide[n], upper.x, lower.x, upper.y, lower.y, b[k][n].x, b[k][n].y);
            }
          }
#pragma unroll
          for (int lower = 0; lower < 2; ++lower) {
            int i = 2 * half + lower;
            // The lane's columns 0 to 3 are its first of each product, 4 to 7 its second.
            auto pair = [&](uint32_t of_base, int n, int e) {
              return word_of<T>(low_of<T>(of_base) + p.scaling * wide[n][2 * lower + e],
                                high_of<T>(of_base) + p.scaling * wide[n + 1][2 * lower + e]);
            };
            uint4 piece{pair(old[i].x, 0, 0), pair(old[i].y, 2, 0), pair(old[i].z, 0, 1), pair(old[i].w, 2, 1)};
            if (who[i] == expert) store(i, piece);
          }
        }
      }
      if (wide_experts.one && wide_experts.lowest != kNoExpert) continue;
      uint32_t lost = word_of<T>(not_a_number(), not_a_number());
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (who[i] == kNoExpert) store(i, {lost, lost, lost, lost});
      }
    }

    for (int gap = 0; gap < p.ranges.gaps; ++gap) {
      copy_gap(at, p.base, p.out, p.width, p.ranges.gap_start[gap], p.ranges.gap_cols[gap]);
    }
  }
}

#define ADAMIX_INSTANTIATE(T)                                                          \
  template __global__ void routed_lora_forward_mma_kernel<T, 1>(RoutedLoraForward<T>); \
  template __global__ void routed_lora_forward_mma_kernel<T, 2>(RoutedLoraForward<T>); \
  template __global__ void routed_lora_forward_mma_kernel<T, 4>(RoutedLoraForward<T>); \
  template __global__ void routed_lora_forward_mma_kernel<T, 6>(RoutedLoraForward<T>); \
  template __global__ void routed_lora_forward_mma_kernel<T, 8>(RoutedLoraForward<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
bool launch_routed_lora_forward_mma(const RoutedLoraForward<T>& params, const Device& device) {
  int ranks = params.ranges.groups * params.rank;
  bool pieces =
      params.x.aligned && params.a_aligned && params.out_aligned && params.ranges.cols % 8 == 0 && params.features > 0;
  pieces = pieces && (params.base.data == nullptr || params.base.aligned);
  for (int group = 0; group < params.ranges.groups; ++group) pieces = pieces && params.ranges.start[group] % 8 == 0;
  bool quads = params.rank % 4 == 0 && reinterpret_cast<uintptr_t>(params.lora_b) % 8 == 0;
  if (device.capability < kFragmentsFrom<T> || ranks < 1 || ranks > 64 || !pieces || !quads) return false;
  auto run = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    Shape shape = shape_of_teams<LoraTeam<T, kTiles>>(params.rows, params.ranges.groups, params.rank, device);
    launch("routed_lora_forward_mma", routed_lora_forward_mma_kernel<T, kTiles>, shape, device, params);
  };
  if (ranks <= 8) {
    run(std::integral_constant<int, 1>{});
  } else if (ranks <= 16) {
    run(std::integral_constant<int, 2>{});
  } else if (ranks <= 32) {
    run(std::integral_constant<int, 4>{});
  } else if (ranks <= 48) {
    run(std::integral_constant<int, 6>{});
  } else {
    run(std::integral_constant<int, 8>{});
  }
  return true;
}

template bool launch_routed_lora_forward_mma(const RoutedLoraForward<half>&, const Device&);
template bool launch_routed_lora_forward_mma(const RoutedLoraForward<bfloat16>&, const Device&);
#endif

}  // namespace adamix
