// Routed LoRA's forward where rows are 16-byte pieces: no operand passes through shared memory.
//
// First product: the warps share out x's columns, each lane loads 16 bytes of a row straight into an operand's
// registers, and the warps' sums are added in their order. Second: the warps share out the output's columns; a lane has
// eight neighbouring ones. Base and x are read once, whatever number of experts serves the rows.
#include "common/launch.h"
#include "routed_lora/lora_forward_team.h"

namespace adamix {

template <typename T, int Tiles>
__global__ void __launch_bounds__(2 * kTeamThreads, 1) routed_lora_forward_mma_kernel(RoutedLoraForward<T> p) {
  if constexpr (kHasFragments<T>) {
    constexpr int kInnerTiles = LoraTeam<T, Tiles>::kInnerTiles;
    SharedMemory memory;
    LaneRows at(p.rows);
    LoraTeam<T, Tiles> team(memory, p.ranges.groups, p.rank, at.teams, at.team);
    team.narrow.clear(at, p.rank);
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
    // Where registers are few, a row behind the last is told by an expert that there is not.
    int who[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) who[i] = kAhead || at.row(i) < at.count ? team.wide_expert[at.row(i)] : -1;
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
        if (inside && (!kAhead || at.row(i) < at.count)) store_piece_at(to, i * rows_apart, piece);
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
            if (k > 0 && 16 * k >= p.rank) break;
            uint4 t = team.narrow.load(at, half, now.group, k);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              multiply<T>(wide[n], t.x, t.y, t.z, t.w, b[k][n].x, b[k][n].y);
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
    if (shape.shared_bytes > static_cast<size_t>(device.shared_bytes)) return false;
    launch("routed_lora_forward_mma", routed_lora_forward_mma_kernel<T, kTiles>, shape, device, params);
    return true;
  };
  if (ranks <= 8) return run(std::integral_constant<int, 1>{});
  if (ranks <= 16) return run(std::integral_constant<int, 2>{});
  if (ranks <= 32) return run(std::integral_constant<int, 4>{});
  if (ranks <= 48) return run(std::integral_constant<int, 6>{});
  return run(std::integral_constant<int, 8>{});
}

template bool launch_routed_lora_forward_mma(const RoutedLoraForward<half>&, const Device&);
template bool launch_routed_lora_forward_mma(const RoutedLoraForward<bfloat16>&, const Device&);
#endif

}  // namespace adamix
