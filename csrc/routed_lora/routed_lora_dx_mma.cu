// The input's gradient of routed LoRA where rows are 16-byte pieces; see routed_lora_fwd_mma.cu. Both factors lie
// across the products' inner dimensions here, and are turned in registers, 8 x 8 elements at a time.
#include "common/launch.h"
#include "routed_lora/lora_team.h"
#include "routed_lora/routed_lora.h"

namespace adamix {

// Tiles: of 16 columns of dt, all groups'.
template <typename T, int Tiles>
struct LoraGradTeam {
  static constexpr int kHalves = Tiles > 1 ? 1 : 2;         // of 16 rows, that a warp has in the first product
  static constexpr int kShares = kTeamWarps / 2 * kHalves;  // of a group's columns
  static constexpr int kDepth = 2;                          // steps under way at a time

  int group_pitch, pitch;
  float* sums;           // [kShares, kTeamRows, pitch], a group's columns at multiples of 16
  NarrowRows<T> narrow;  // dt
  int* wide_expert;      // [kTeamRows]

  template <typename Memory>
  ADAMIX_BOTH LoraGradTeam(Memory& memory, int groups, int rank, int teams, int team)
      : group_pitch(round_up(rank, 16)),
        pitch(16 * (groups * ceil_div(rank, 16) | 1)),  // an odd number of 64 bytes: no bank twice
        sums(memory.template take<float>(teams * kShares * kTeamRows * pitch) + team * kShares * kTeamRows * pitch),
        narrow(memory, 1, groups * rank, teams, team),
        wide_expert(memory.template take<int>(teams * kTeamRows) + team * kTeamRows) {}
};

// The warp's part of a group's grad_out B into its place in team.sums, and the rows' wide experts; complete after a
// barrier. grad_out is asked for before the ids are known.
template <typename T, int Tiles>
ADAMIX_DEVICE void multiply_share(const RoutedLoraInputGrad<T>& p, const LoraGradTeam<T, Tiles>& team,
                                  const LaneRows& at, TeamExperts& experts, int group) {
  using Team = LoraGradTeam<T, Tiles>;
  constexpr int kDepth = Team::kDepth, kHalves = Team::kHalves, kShares = Team::kShares;
  int cols = p.ranges.cols, steps = ceil_div(cols, kStep);
  int share = kHalves == 1 ? at.warp / 2 : at.warp, first = kHalves == 1 ? at.warp % 2 * 2 : 0;  // of the lane's rows
  float sums[kHalves][Tiles][2][4] = {};
  const T* grad[2 * kHalves];
#pragma unroll
  for (int i = 0; i < 2 * kHalves; ++i) {
    grad[i] = p.grad_out.data + p.grad_out.offset(at.number(first + i)) + p.ranges.start[group] + 8 * at.q;
  }
  for (int step = share; step < steps; step += kDepth * kShares) {
    uint4 rows[kDepth][2 * kHalves];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int col = (step + d * kShares) * kStep;
      bool inside = col + 8 * at.q < cols;
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) rows[d][i] = inside ? load_words<uint4>(grad[i] + col) : uint4{0, 0, 0, 0};
    }
    if (group == 0 && step == share) {
      LaneRouting routing(at, p.b, p.a);
      experts = TeamExperts(routing.narrow, at);
      if (at.warp == 0) team.wide_expert[at.lane] = routing.wide;
    }
    // Columns of the products' second operands: ranks 4 q to 4 q + 3 are a lane's sums.
    auto multiply = [&](int expert, int tile, auto sums_of) {
      int64_t range = (static_cast<int64_t>(expert) * p.ranges.groups + group) * cols;
      bool ranked = 16 * tile + 4 * at.q < p.rank;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        int col = (step + d * kShares) * kStep + at.spread(8);
        const T* from = p.lora_b + (range + col) * p.rank + 16 * tile + 4 * at.q;
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
          multiply_step<T>(sums_of(half, 0), upper, lower, {b[0].x, b[1].x, b[2].x, b[3].x});
          multiply_step<T>(sums_of(half, 1), upper, lower, {b[0].y, b[1].y, b[2].y, b[3].y});
        }
      }
    };
    if (experts.one) {
      if (experts.lowest == kNoExpert) continue;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        if (16 * tile >= p.rank) break;
        multiply(experts.lowest, tile, [&](int half, int u) -> float (&)[4] { return sums[half][tile][u]; });
      }
      continue;
    }
    for (int expert = experts.lowest; expert != kNoExpert; expert = experts.after(expert)) {
      bool mine[2 * kHalves];
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) mine[i] = experts.of_row(at.row(first + i)) == expert;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        if (16 * tile >= p.rank) break;
        float own[kHalves][2][4] = {};
        multiply(expert, tile, [&](int half, int u) -> float (&)[4] { return own[half][u]; });
#pragma unroll
        for (int e = 0; e < 8 * kHalves; ++e) {
          int half = e / 8, u = e / 4 % 2;
          if (mine[2 * half + e % 4 / 2]) sums[half][tile][u][e % 4] += own[half][u][e % 4];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kHalves; ++i) {
    float* to = team.sums + (share * kTeamRows + at.row(first + i)) * team.pitch + group * team.group_pitch + 4 * at.q;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      if (16 * tile >= p.rank) break;
      const auto& of = sums[i / 2][tile];
      int e = i % 2 * 2;
      store_words(to + 16 * tile, float4{of[0][e], of[0][e + 1], of[1][e], of[1][e + 1]});
    }
  }
}

// dt of the team's rows = scaling times the warps' sums, added in their order; complete in team.narrow after a barrier.
template <typename T, int Tiles>
ADAMIX_DEVICE void add_shares(const RoutedLoraInputGrad<T>& p, const LoraGradTeam<T, Tiles>& team, const LaneRows& at) {
  int ranks = p.ranges.groups * p.rank;
  for (int pair = at.thread(); pair < kTeamRows * ranks / 2; pair += kTeamThreads) {
    int row = pair / (ranks / 2), col = pair % (ranks / 2) * 2;
    if (row >= at.count) continue;
    int group = col / p.rank;
    const float* from = team.sums + row * team.pitch + group * team.group_pitch + col - group * p.rank;
    FloatPair sum{};
#pragma unroll
    for (int of = 0; of < LoraGradTeam<T, Tiles>::kShares; ++of) {
      FloatPair part = load_words<FloatPair>(from + of * kTeamRows * team.pitch);
      sum = {sum.low + part.low, sum.high + part.high};
    }
    uint32_t dt = word_of<T>(p.scaling * sum.low, p.scaling * sum.high);
    if (p.dt != nullptr) store_words(p.dt + (at.first + row) * ranks + col, dt);
    store_words(team.narrow.data + row * team.narrow.pitch + col, dt);
  }
}

template <typename T, int Tiles>
__global__ void __launch_bounds__(2 * kTeamThreads, 1) routed_lora_input_grad_mma_kernel(RoutedLoraInputGrad<T> p) {
  if constexpr (kHasFragments<T>) {
    SharedMemory memory;
    LaneRows at(p.rows);
    LoraGradTeam<T, Tiles> team(memory, p.ranges.groups, p.rank, at.teams, at.team);
    TeamExperts narrow;
    team.narrow.clear(at);
    for (int group = 0; group < p.ranges.groups; ++group) multiply_share(p, team, at, narrow, group);
    __syncthreads();
    add_shares(p, team, at);
    if (p.dx == nullptr) return;
    TeamExperts wide_experts(team.wide_expert[at.lane], at);
    int who[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) who[i] = team.wide_expert[at.row(i)];
    __syncthreads();

    DropoutMask mask(p.dropout);
    DropoutMask::RowKeys own_keys{};  // of row `lane`
    if (mask.drops()) own_keys = mask.of_row(at.first + at.lane);
    float scale = mask.drops() ? p.dropout.scale : 1.f;
    int ranks = p.ranges.groups * p.rank, cols = p.features;
    int64_t rows_apart = static_cast<int64_t>(8 * sizeof(T)) * cols;
    for (int first = at.warp * kStep; first < cols; first += kTeamWarps * kStep) {
      int col = first + 8 * at.q;
      bool inside = col < cols;
      T* to = p.dx + (at.first + at.g) * cols + col;
      auto store = [&](int i, uint4 piece) {
        if (inside && at.row(i) < at.count) store_piece_at(to, i * rows_apart, piece);
      };
      for (int expert = wide_experts.lowest; expert != kNoExpert; expert = wide_experts.after(expert)) {
        const T* weight = p.lora_a + static_cast<int64_t>(expert) * ranks * cols + col;
        uint4 a[Tiles][2];
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            int rank = 16 * tile + at.spread(4) + 2 * u;
            a[tile][u] = inside && rank < ranks ? load_words<uint4>(weight + static_cast<int64_t>(rank) * cols)
                                                : uint4{0, 0, 0, 0};
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
            if (mask.drops()) {
              DropoutMask::RowKeys keys{shuffle_from(own_keys.factor, at.row(i)),
                                        shuffle_from(own_keys.offset, at.row(i))};
              piece = mask.kept(piece, keys, DropoutMask::EightColumns(col));
            }
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
  }
}

#define ADAMIX_INSTANTIATE(T)                                                               \
  template __global__ void routed_lora_input_grad_mma_kernel<T, 1>(RoutedLoraInputGrad<T>); \
  template __global__ void routed_lora_input_grad_mma_kernel<T, 2>(RoutedLoraInputGrad<T>); \
  template __global__ void routed_lora_input_grad_mma_kernel<T, 3>(RoutedLoraInputGrad<T>); \
  template __global__ void routed_lora_input_grad_mma_kernel<T, 4>(RoutedLoraInputGrad<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
bool launch_routed_lora_input_grad_mma(const RoutedLoraInputGrad<T>& params, const Device& device) {
  int ranks = params.ranges.groups * params.rank;
  bool pieces = params.grad_out.aligned && params.a_aligned && params.dx_aligned && params.ranges.cols % 8 == 0;
  for (int group = 0; group < params.ranges.groups; ++group) pieces = pieces && params.ranges.start[group] % 8 == 0;
  bool quads = params.rank % 4 == 0 && reinterpret_cast<uintptr_t>(params.lora_b) % 8 == 0;
  bool fits = ranks > 0 && params.ranges.cols > 0 && params.ranges.groups * round_up(params.rank, 16) <= 64;
  if (device.capability < kFragmentsFrom<T> || !pieces || !quads || !fits) return false;
  auto run = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    Shape shape = shape_of_teams<LoraGradTeam<T, kTiles>>(params.rows, params.ranges.groups, params.rank, device);
    launch("routed_lora_input_grad_mma", routed_lora_input_grad_mma_kernel<T, kTiles>, shape, device, params);
  };
  if (ranks <= 16) {
    run(std::integral_constant<int, 1>{});
  } else if (ranks <= 32) {
    run(std::integral_constant<int, 2>{});
  } else if (ranks <= 48) {
    run(std::integral_constant<int, 3>{});
  } else {
    run(std::integral_constant<int, 4>{});
  }
  return true;
}

template bool launch_routed_lora_input_grad_mma(const RoutedLoraInputGrad<half>&, const Device&);
template bool launch_routed_lora_input_grad_mma(const RoutedLoraInputGrad<bfloat16>&, const Device&);
#endif

}  // namespace adamix
