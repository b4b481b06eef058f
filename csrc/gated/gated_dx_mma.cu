// The gradients of the input and of the gates where rows are 16-byte pieces; see gated_fwd_mma.cu. Both banks lie
// across the products' inner dimensions here, and are turned in registers, 8 x 8 elements at a time.
#include "gated/gated_slots.h"

namespace adamix {

// The warp's part of a group's grad_out B, of ranks of all experts from rank0 on, into its place in team.sums; with the
// first of them, of grad_out times the biases.
template <typename T>
ADAMIX_DEVICE void multiply_up(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, const LaneRows& at, int group,
                               int rank0) {
  using Team = GatedGradTeam<T>;
  constexpr int kDepth = 2;
  int cols = p.ranges.cols, steps = ceil_div(cols, kStep), inner = p.gates.up.experts * p.rank;
  int tiles = ceil_div(inner - rank0, 16);
  int share = at.warp / 2, first = at.warp % 2 * 2;  // of the lane's rows
  bool biased = p.up_bias != nullptr && rank0 == 0;
  float sums[Team::kTiles][2][4] = {}, of_bias[kMostBiases / 8][4] = {};
  const T* grad[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    grad[i] = p.grad_out.data + p.grad_out.offset(at.number(first + i)) + p.ranges.start[group] + 8 * at.q;
  }
  const T* bank = p.up + static_cast<int64_t>(group) * cols * p.rank;
  int64_t expert_size = static_cast<int64_t>(p.ranges.groups) * cols * p.rank;
  uint32_t apart = static_cast<uint32_t>(2 * sizeof(T)) * static_cast<uint32_t>(p.rank);  // bytes of two rows
  for (int step = share; step < steps; step += kDepth * kTeamShares) {
    uint4 rows[kDepth][2];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      int col = (step + d * kTeamShares) * kStep;
      bool inside = col + 8 * at.q < cols;
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[d][i] = inside ? load_words<uint4>(grad[i] + col) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int tile = 0; tile < Team::kTiles; ++tile) {
      if (tile >= tiles) break;
      int from = rank0 + 16 * tile + 4 * at.q, expert = static_cast<int>(p.by_rank.quotient(from));
      const T* own = bank + expert * expert_size + from - expert * p.rank +
                     static_cast<int64_t>(step * kStep + at.spread(8)) * p.rank;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        bool there = from < inner && (step + d * kTeamShares) * kStep + at.spread(8) < cols;
        uint2 b[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t pairs = d * kTeamShares * kStep / 2 + w;  // of rows behind
          b[w] = there ? load_words<uint2>(reinterpret_cast<const char*>(own) + uint64_t{apart} * pairs) : uint2{0, 0};
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) b[w] = uint2{transposed(b[w].x), transposed(b[w].y)};
        multiply_step<T>(sums[tile][0], rows[d][0], rows[d][1], {b[0].x, b[1].x, b[2].x, b[3].x});
        multiply_step<T>(sums[tile][1], rows[d][0], rows[d][1], {b[0].y, b[1].y, b[2].y, b[3].y});
      }
    }
#pragma unroll
    for (int tile = 0; tile < kMostBiases / 8; ++tile) {
      if (!biased || 8 * tile >= p.gates.up.experts) break;
      int expert = 8 * tile + at.g < p.gates.up.experts ? 8 * tile + at.g : 0;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        int col = (step + d * kTeamShares) * kStep + 8 * at.q;
        const T* from = p.up_bias + static_cast<int64_t>(expert) * cols + col;
        uint4 b = col < cols ? load_words<uint4>(from) : uint4{0, 0, 0, 0};
        multiply_step<T>(of_bias[tile], rows[d][0], rows[d][1], b);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int place = share * kTeamRows + at.row(first + i), e = 2 * i;
    float* to = team.sums + place * Team::kPitch + 4 * at.q;
#pragma unroll
    for (int tile = 0; tile < Team::kTiles; ++tile) {
      const auto& of = sums[tile];
      store_words(to + 16 * tile, float4{of[0][e], of[0][e + 1], of[1][e], of[1][e + 1]});
    }
    if (!biased) continue;
#pragma unroll
    for (int tile = 0; tile < kMostBiases / 8; ++tile) {
      store_words(team.bias_sums + place * kMostBiases + 8 * tile + 2 * at.q,
                  FloatPair{of_bias[tile][e], of_bias[tile][e + 1]});
    }
  }
}

// u of a group's ranks from rank0 on = the warps' sums, added in their order.
template <typename T>
ADAMIX_DEVICE void add_up(const GatedInputGrad<T>& p, const GatedGradTeam<T>& team, const LaneRows& at, int group,
                          int rank0) {
  constexpr int kPitch = GatedGradTeam<T>::kPitch;
  int col = rank0 + 2 * at.lane;
  if (col >= p.gates.up.experts * p.rank) return;
  int expert = static_cast<int>(p.by_rank.quotient(col));
  for (int row = at.warp; row < at.count; row += kTeamWarps) {
    const float* from = team.sums + row * kPitch + 2 * at.lane;
    FloatPair sum{0.f, 0.f};
#pragma unroll
    for (int of = 0; of < kTeamShares; ++of) {
      FloatPair part = load_words<FloatPair>(from + of * kTeamRows * kPitch);
      sum = {sum.low + part.low, sum.high + part.high};
    }
    team.u.store(row, expert * p.ranks() + group * p.rank + col - expert * p.rank, word_of<T>(sum.low, sum.high));
  }
}

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, 2) gated_input_grad_mma_kernel(GatedInputGrad<T> p) {
  if constexpr (kHasFragments<T>) {
    SharedMemory memory;
    LaneRows at(p.rows);
    GatedGradTeam<T> team(memory, p);
    const SlotExperts& down = p.gates.down;
    int ranks = p.ranks(), inner = p.gates.up.experts * p.rank, down_cols = down.experts * ranks;
    team.dt.clear(at);
    team.table.fill(p.gates, at);
    for (int group = 0; p.gathers && group < p.ranges.groups; ++group) {
      for (int rank0 = 0; rank0 < inner; rank0 += kChunkRanks) {
        multiply_up(p, team, at, group, rank0);
        __syncthreads();
        add_up(p, team, at, group, rank0);
        __syncthreads();
      }
    }
    __syncthreads();
    unmix(p, team, at);
    if (p.dx == nullptr) return;
    __syncthreads();

    DropoutMask mask(p.dropout);
    DropoutMask::RowKeys own_keys{};  // of row `lane`
    if (mask.drops()) own_keys = mask.of_row(at.first + at.lane);
    float scale = mask.drops() ? p.dropout.scale : 1.f;
    int cols = p.features;
    uint32_t apart =
        static_cast<uint32_t>(2 * sizeof(T)) * static_cast<uint32_t>(cols);  // bytes of two rows of the bank
    for (int first = at.warp * kStep; first < cols; first += kTeamWarps * kStep) {
      int col = first + 8 * at.q;
      bool inside = col < cols;
      float wide[2][4][4] = {};
      uint4 a[2];
      const char* bank = reinterpret_cast<const char*>(p.down + static_cast<int64_t>(at.spread(4)) * cols + col);
      auto load = [&](int k, uint2(&b)[4]) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          bool there = inside && 16 * k + at.spread(4) + 2 * u < down_cols;
          const char* from = bank + uint64_t{apart} * static_cast<uint32_t>(8 * k + u);
          a[u] = there ? load_words<uint4>(from) : uint4{0, 0, 0, 0};
          a[u] = uint4{transposed(a[u].x), transposed(a[u].y), transposed(a[u].z), transposed(a[u].w)};
        }
        b[0] = {a[0].x, a[1].x}, b[1] = {a[0].y, a[1].y}, b[2] = {a[0].z, a[1].z}, b[3] = {a[0].w, a[1].w};
      };
      // Turned, a lane's words are of ranks 4 q to 4 q + 3 too.
      auto expert_of = [&](int k, int, int only, uint2 b) {
        return static_cast<int>(p.by_ranks.quotient(16 * k + 4 * at.q)) == only ? b : uint2{0, 0};
      };
      multiply_wide<T>(
          wide, ceil_div(down_cols, 16), down.differ(), down.experts,
          [&](int half, int k, uint2& upper, uint2& lower) { team.dt.load(at, half, 16 * k, upper, lower); }, load,
          expert_of,
          [&](int i, int expert) {
            bool named = false;
            for (int slot = 0; slot < p.gates.slots; ++slot) {
              named = named || team.table.down[at.row(i) * p.gates.slots + slot] == expert;
            }
            return named;
          });
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& sums = wide[i / 2];
        int below = i % 2;
        auto word = [&](int n) { return word_of<T>(scale * sums[n][2 * below], scale * sums[n][2 * below + 1]); };
        uint4 piece{word(0), word(1), word(2), word(3)};
        if (mask.drops()) {
          DropoutMask::RowKeys keys{shuffle_from(own_keys.factor, at.row(i)), shuffle_from(own_keys.offset, at.row(i))};
          piece = mask.kept(piece, keys, DropoutMask::EightColumns(col));
        }
        if (!inside || at.row(i) >= at.count) continue;
        if (p.add_input) {
          uint4 added = load_words<uint4>(p.grad_out.data + p.grad_out.offset(at.number(i)) + col);
          auto sum = [&](int n, uint32_t of) {
            return word_of<T>(sums[n][2 * below] + low_of<T>(of), sums[n][2 * below + 1] + high_of<T>(of));
          };
          piece = uint4{sum(0, added.x), sum(1, added.y), sum(2, added.z), sum(3, added.w)};
        }
        uint32_t lost = word_of<T>(not_a_number(), not_a_number());
        if (!team.table.served[at.row(i)]) piece = {lost, lost, lost, lost};
        store_piece_at(p.dx + (at.first + at.row(i)) * cols + col, 0, piece);
      }
    }
  }
}

template __global__ void gated_input_grad_mma_kernel<half>(GatedInputGrad<half>);
template __global__ void gated_input_grad_mma_kernel<bfloat16>(GatedInputGrad<bfloat16>);

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
bool gated_team_takes(const GatedInputGrad<T>& params, bool biased, const Device& device) {
  bool pieces = params.grad_out.aligned && params.dx_aligned && reinterpret_cast<uintptr_t>(params.t) % 4 == 0 &&
                reinterpret_cast<uintptr_t>(params.up_bias) % 16 == 0;
  return pieces && team_fits(params, biased, device) &&
         shared_bytes<GatedGradTeam<T>>(params) <= static_cast<size_t>(device.shared_bytes);
}

template <typename T>
void launch_gated_input_grad_mma(const GatedInputGrad<T>& params, const Device& device) {
  dim3 grid(static_cast<unsigned>((params.rows + kTeamRows - 1) / kTeamRows));
  launch("gated_input_grad_mma", gated_input_grad_mma_kernel<T>,
         {grid, kTeamThreads, shared_bytes<GatedGradTeam<T>>(params)}, device, params);
}

#define ADAMIX_INSTANTIATE(T)                                                    \
  template bool gated_team_takes(const GatedInputGrad<T>&, bool, const Device&); \
  template void launch_gated_input_grad_mma(const GatedInputGrad<T>&, const Device&);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE
#endif

}  // namespace adamix
