// The forward with gates where one expert up serves all: a tile of rows stays in registers from the first product to
// the second, as where tokens are routed (routed_adapter/resident_tile.h), and gates make one expert's narrow values of
// all.
#include "gated/gated_team.h"
#include "routed_adapter/resident_launch.h"

namespace adamix {

template <typename T, int Groups>
struct GatedResident {
  static constexpr int kRows = Groups * kFragmentRows;
  static_assert(kRows <= kTeamRows, "the table's rows");
  ResidentMemory<T, Groups> tile;
  TeamValues<T> t;
  SlotTable<T> table;
  float* bias_gates;  // [kRows]

  template <typename Memory>
  ADAMIX_BOTH GatedResident(Memory& memory, const GatedForward<T>& p, int warps)
      : tile(memory, warps, p.rank),
        t(memory, p.gates.down.experts * p.rank),
        table(memory, p.gates),
        bias_gates(memory.template take<float>(kRows)) {}
};

ADAMIX_DEVICE int lane_words(int group) { return group * 128 + static_cast<int>(threadIdx.x) % 32 * 4; }

// out = tile + narrow up^T, and the bias that each row's gates weigh; narrow: [Groups, 32 lanes, 4 words] as left
// operands lie in registers.
template <typename T, int Groups, int Chunks>
ADAMIX_DEVICE void multiply_one_up(const GatedForward<T>& p, const GatedResident<T, Groups>& memory,
                                   const ResidentTile<T, Groups, Chunks>& tile) {
  ResidentBank<T> bank{p.up, p.features, p.rank};
  T* to = p.out + (tile.first + fragment_row()) * p.features + tile.col0;
  int64_t eight_rows = static_cast<int64_t>(8 * sizeof(T)) * p.features;
  forget(eight_rows);
  Words left[Groups];
  float gate[2 * Groups];
  bool keep[2 * Groups];
#pragma unroll
  for (int m = 0; m < Groups; ++m) left[m] = *reinterpret_cast<const Words*>(memory.tile.narrow + lane_words(m));
#pragma unroll
  for (int i = 0; i < 2 * Groups; ++i) {
    int row = 8 * i + fragment_row();
    gate[i] = memory.bias_gates[row], keep[i] = memory.table.served[row] != 0;
  }
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    int col = tile.col0 + c * kFragmentCols;
    uint32_t w[4][2];
    bank.load_cols(w, fragment_part() * 4, col - fragment_part() * 8);
    Words shift{};
    if (p.up_bias != nullptr) shift = *reinterpret_cast<const Words*>(p.up_bias + col);
#pragma unroll
    for (int m = 0; m < Groups; ++m) {
      Words top = here(tile.rows[m][0][c]), bottom = here(tile.rows[m][1][c]);
      float sums[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float low = low_of<T>(shift.at[k]), high = high_of<T>(shift.at[k]);
        sums[k][0] = low_of<T>(top.at[k]) + gate[2 * m] * low;
        sums[k][1] = high_of<T>(top.at[k]) + gate[2 * m] * high;
        sums[k][2] = low_of<T>(bottom.at[k]) + gate[2 * m + 1] * low;
        sums[k][3] = high_of<T>(bottom.at[k]) + gate[2 * m + 1] * high;
        const uint32_t (&a)[4] = left[m].at;
        multiply<T>(sums[k], a[0], a[1], a[2], a[3], w[k][0], w[k][1]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4 piece{word_of<T>(sums[0][2 * i], sums[0][2 * i + 1]), word_of<T>(sums[1][2 * i], sums[1][2 * i + 1]),
                    word_of<T>(sums[2][2 * i], sums[2][2 * i + 1]), word_of<T>(sums[3][2 * i], sums[3][2 * i + 1])};
        if (keep[2 * m + i]) store_piece_at(to + c * kFragmentCols, (2 * m + i) * eight_rows, piece);
      }
    }
  }
}

template <typename T, int Groups, int Chunks>
__global__ void __launch_bounds__(kResidentThreads) gated_resident_forward_kernel(GatedForward<T> p) {
  if constexpr (kHasFragments<T>) {
    constexpr int kRows = GatedResident<T, Groups>::kRows;
    SharedMemory shared;
    GatedResident<T, Groups> memory(shared, p, blockDim.x / 32);
    ResidentTile<T, Groups, Chunks> tile;
    tile.place(p.rows);
    tile.load(p.x);
    const SlotTable<T>& table = memory.table;
    table.fill(p.gates, tile.first, tile.count, threadIdx.x, blockDim.x);
    const SlotExperts& side = p.gates.down;
    int cols = side.experts * p.rank, width = side.slots * p.rank;
    ResidentBank<T> down{p.down, p.features, cols};
    for (int col0 = 0; col0 < cols; col0 += kFragmentRanks) {
      tile.template narrow_part<true>(memory.tile, down, col0);
      __syncthreads();
      tile.join_parts(memory.tile, col0, [&](int row, int col, float low, float high, uint32_t*) {
        if (col >= cols || !table.served[row]) return;
        if (p.down_bias != nullptr) {
          uint32_t bias = load_words<uint32_t>(p.down_bias + col);
          low += low_of<T>(bias), high += high_of<T>(bias);
        }
        uint32_t word = word_of<T>(low, high);
        memory.t.store(row, col, word);
        T* to = p.t + (tile.first + row) * width;
        if (!side.differ()) {
          store_words(to + col, word);
          return;
        }
        int expert = static_cast<int>(p.by_rank.quotient(col));
        table.each(side, table.down, row, expert,
                   [&](int, int slot) { store_words(to + slot * p.rank + col - expert * p.rank, word); });
      });
      __syncthreads();
    }
    for (int i = threadIdx.x; i < kRows * 8; i += blockDim.x) {
      int row = i / 8, pair = i % 8;
      FloatPair own{0.f, 0.f};
      if (2 * pair < p.rank && table.served[row]) own = mixed_pair<T>(p, table, memory.t, row, 0, 2 * pair);
      int word = row % 8 * 16 + pair / 2 * 4 + pair % 2 * 2 + row / 8 % 2;
      memory.tile.narrow[row / 16 * 128 + word] = word_of<T>(own.low, own.high);
    }
    for (int row = threadIdx.x; row < kRows; row += blockDim.x) {
      memory.bias_gates[row] = bias_gate<T>(p, table, row, 0);
    }
    bool held = p.base.data == p.x.data && p.base.batch_stride == p.x.batch_stride;
    if (p.base.data == nullptr) {
#pragma unroll
      for (int n = 0; n < 2 * Groups * Chunks; ++n) tile.rows[n / Chunks / 2][n / Chunks % 2][n % Chunks] = Words{};
    } else if (!held || p.base.token_stride != p.x.token_stride) {
      tile.load(p.base);
    }
    __syncthreads();
    multiply_one_up(p, memory, tile);
    for (int row = threadIdx.x / 32; row < tile.count; row += blockDim.x / 32) {
      if (table.served[row]) continue;
      for (int col = threadIdx.x % 32; col < p.features; col += 32) {
        p.out[(tile.first + row) * p.features + col] = from_float<T>(not_a_number());
        if (col < width) p.t[(tile.first + row) * width + col] = from_float<T>(not_a_number());
      }
    }
  }
}

#define ADAMIX_INSTANTIATE(T)                                                       \
  template __global__ void gated_resident_forward_kernel<T, 1, 8>(GatedForward<T>); \
  template __global__ void gated_resident_forward_kernel<T, 2, 4>(GatedForward<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
bool launch_gated_resident_forward(const GatedForward<T>& params, const Device& device) {
  const Gates& gates = params.gates;
  bool square = params.ranges.groups == 1 && params.ranges.cols == params.features && params.width == params.features;
  bool fits = gates.up.experts == 1 && square && params.dropout.seed == nullptr && params.rank <= kFragmentRanks &&
              gates.down.slots * params.rank <= params.features &&
              reinterpret_cast<uintptr_t>(params.up_bias) % 16 == 0;
  ResidentShape shape = resident_shape<T>(params.rows, params.features, params.rank, device);
  // A team's table has no place for the tiles of narrow rows of features.
  if (!fits || shape.groups == 0 || shape.groups * kFragmentRows > kTeamRows) return false;
  auto run = [&](auto groups, auto chunks) {
    constexpr int kGroups = decltype(groups)::value, kChunks = decltype(chunks)::value;
    int threads = shape.warps(params.features) * 32;
    size_t bytes = shared_bytes<GatedResident<T, kGroups>>(params, threads / 32);
    if (bytes > static_cast<size_t>(device.shared_bytes)) return false;
    dim3 grid(static_cast<unsigned>((params.rows + kGroups * kFragmentRows - 1) / (kGroups * kFragmentRows)));
    launch("gated_resident_forward", gated_resident_forward_kernel<T, kGroups, kChunks>, {grid, threads, bytes}, device,
           params);
    return true;
  };
  if (shape.groups == 1) return run(std::integral_constant<int, 1>{}, std::integral_constant<int, 8>{});
  return run(std::integral_constant<int, 2>{}, std::integral_constant<int, 4>{});
}

template bool launch_gated_resident_forward(const GatedForward<half>&, const Device&);
template bool launch_gated_resident_forward(const GatedForward<bfloat16>&, const Device&);
#endif

}  // namespace adamix
