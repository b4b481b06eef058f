// The forward with gates of a router where rows are 16-byte pieces: x is read once, for the logits and the narrow
// values.
#include "gated/gated_forward_team.h"
#include "mixture/mixture.h"
#include "router/choice.h"

namespace adamix {

// x times the router's rows, eight experts a tile: what rides in the first product. The lanes behind the last expert
// take that one; their sums are not used.
template <typename T, int Tiles, typename Weight>
struct RouterTile {
  static constexpr bool kRides = true;

  const Weight* from[Tiles];
  int features;
  uint4 words[Tiles][kDownDepth];
  float sums[Tiles][4] = {};

  ADAMIX_DEVICE RouterTile(const MixtureForward<T>& p, const LaneRows& at) : features(p.features) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      int expert = 8 * tile + at.g < p.routed ? 8 * tile + at.g : p.routed - 1;
      from[tile] = static_cast<const Weight*>(p.router) + static_cast<int64_t>(expert) * p.features;
    }
  }
  // Of the steps that begin at the lane's column `col`.
  ADAMIX_DEVICE void load(int col) {
#pragma unroll
    for (int d = 0; d < kDownDepth; ++d) {
      int at = col + d * kTeamShares * kStep;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        words[tile][d] = at < features ? eight(from[tile] + at) : uint4{0, 0, 0, 0};
      }
    }
  }
  static ADAMIX_DEVICE uint4 eight(const T* at) { return load_words<uint4>(at); }
  static ADAMIX_DEVICE uint4 eight(const float* at) {
    Piece<float> low = load_words<Piece<float>>(at), high = load_words<Piece<float>>(at + 4);
    return uint4{word_of<T>(low.values[0], low.values[1]), word_of<T>(low.values[2], low.values[3]),
                 word_of<T>(high.values[0], high.values[1]), word_of<T>(high.values[2], high.values[3])};
  }
  ADAMIX_DEVICE void multiply(const uint4 (&rows)[kDownDepth][2]) {
#pragma unroll
    for (int d = 0; d < kDownDepth; ++d) {
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        multiply_step<T>(sums[tile], rows[d][0], rows[d][1], words[tile][d]);
      }
    }
  }
  // The sums of the lane's row i.
  ADAMIX_DEVICE void store(float* to, int i) const {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      store_words(to + 8 * tile, FloatPair{sums[tile][2 * i], sums[tile][2 * i + 1]});
    }
  }
};

// Logits, gates and experts of the warp's own rows, a lane for each expert: to memory, and to the table of slots.
template <typename T, int Tiles>
ADAMIX_DEVICE void choose(const MixtureForward<T>& p, const GatedTeam<T, Tiles>& team, const LaneRows& at) {
  constexpr int kLanes = 8 * Tiles, kAtOnce = 32 / kLanes, kPitch = GatedTeam<T, Tiles>::kPitch;
  const SlotTable<T>& table = team.table;
  int lane = at.lane % kLanes, begin = at.lane - lane, slots = p.gates.slots;
#pragma unroll
  for (int first = 0; first < kTeamRows; first += kAtOnce * kTeamWarps) {
    int row = first + at.lane / kLanes * kTeamWarps + at.warp;
    bool inside = row < at.count;
    int64_t number = at.first + row;
    const float* from = team.sums + row * kPitch + kChunkRanks + lane;
    float logit = from[0];
#pragma unroll
    for (int share = 1; share < kTeamShares; ++share) logit += from[share * kTeamRows * kPitch];
    if (inside && lane < p.routed) p.logits[number * p.routed + lane] = logit;

    int id = lane;  // of slot `lane`, as its logit
    float top;
    if (p.ids == nullptr) {
      top = warp_reduce<kLanes>(logit, Max{});
    } else {
      bool left = lane < p.routed;
      float own = logit, rank = own != own ? infinity() : own;
#pragma unroll 1
      for (int slot = 0; slot < slots; ++slot) {
        Ranked mine{left ? rank : -infinity(), left ? lane : kRouterMostExperts};
        int best = warp_reduce<kLanes>(mine, Larger{}).id;
        float of_best = shuffle_from(own, begin + best);
        if (lane == best) left = false;
        if (lane == slot) id = best, logit = of_best;
      }
      top = shuffle_from(logit, begin);
    }
    float share = lane < slots ? expf(logit - top) : 0.f;
    float gate = share / warp_reduce<kLanes>(share, Add{});
    if (lane == 0) table.served[row] = inside;
    if (lane >= slots) continue;
    int place = row * slots + lane;
    table.gate[place] = gate, table.scale[place] = p.gates.scaling;
    table.down[place] = p.gates.down.experts == 1 ? 0 : id, table.up[place] = p.gates.up.experts == 1 ? 0 : id;
    if (!inside) continue;
    p.gate_values[number * slots + lane] = gate;
    if (p.ids != nullptr) p.ids[number * slots + lane] = id;
  }
  __syncwarp();
}

template <typename T, int Tiles, typename Weight>
__global__ void __launch_bounds__(kTeamThreads, 2) mixture_forward_mma_kernel(MixtureForward<T> p) {
  if constexpr (kHasFragments<T>) {
    SharedMemory memory;
    LaneRows at(p.rows);
    GatedTeam<T, Tiles> team(memory, p);
    int down_cols = p.gates.down.experts * p.ranks();
    team.narrow.clear(at);
    multiply_down(p, team, at, 0, down_cols, RouterTile<T, Tiles, Weight>(p, at));
    __syncthreads();
    choose(p, team, at);
    add_down(p, team, at, 0, down_cols);
    __syncthreads();
    for (int col0 = kChunkRanks; col0 < down_cols; col0 += kChunkRanks) {
      multiply_down(p, team, at, col0, down_cols, NoMore{});
      __syncthreads();
      add_down(p, team, at, col0, down_cols);
      __syncthreads();
    }
    mix_team(p, team, at);
    __syncthreads();
    multiply_up(p, team, at);
  }
}

#define ADAMIX_INSTANTIATE(T)                                                          \
  template __global__ void mixture_forward_mma_kernel<T, 1, T>(MixtureForward<T>);     \
  template __global__ void mixture_forward_mma_kernel<T, 1, float>(MixtureForward<T>); \
  template __global__ void mixture_forward_mma_kernel<T, 2, T>(MixtureForward<T>);     \
  template __global__ void mixture_forward_mma_kernel<T, 2, float>(MixtureForward<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
bool launch_mixture_forward_mma(const MixtureForward<T>& params, const Device& device) {
  bool pieces = params.x.aligned && params.out_aligned && (params.base.data == nullptr || params.base.aligned);
  pieces = pieces && reinterpret_cast<uintptr_t>(params.router) % 16 == 0;
  if (!pieces || params.routed > kMixtureMostExperts || !team_fits<T>(params, false, device)) return false;
  auto run = [&](auto tiles, auto weight) {
    constexpr int kTiles = decltype(tiles)::value;
    size_t bytes = shared_bytes<GatedTeam<T, kTiles>>(params);
    if (bytes > static_cast<size_t>(device.shared_bytes)) return false;
    dim3 grid(static_cast<unsigned>((params.rows + kTeamRows - 1) / kTeamRows));
    launch("mixture_forward_mma", mixture_forward_mma_kernel<T, kTiles, typename decltype(weight)::type>,
           {grid, kTeamThreads, bytes}, device, params);
    return true;
  };
  auto with_tiles = [&](auto weight) {
    if (params.routed <= 8) return run(std::integral_constant<int, 1>{}, weight);
    return run(std::integral_constant<int, 2>{}, weight);
  };
  return params.wide ? with_tiles(Type<float>{}) : with_tiles(Type<T>{});
}

template bool launch_mixture_forward_mma(const MixtureForward<half>&, const Device&);
template bool launch_mixture_forward_mma(const MixtureForward<bfloat16>&, const Device&);
#endif

}  // namespace adamix
