// The backward with gates for any rows: the gradients of the input and of the gates in one launch, those of the weights
// in another.
#include "common/piece.h"
#include "common/routed_launch.h"
#include "gated/dense_grad.h"
#include "gated/gated_tile.h"
#include "gated/mix_rows.h"

namespace adamix {

// kInner columns from k0 on of a group of B, kNarrow ranks from rank0 on of all experts, one after the other.
template <typename T>
ADAMIX_DEVICE void load_up_ranks(T* right, const GatedInputGrad<T>& p, int group, int k0, int rank0) {
  constexpr int kNarrow = GatedTile<T>::kNarrow, kSize = Piece<T>::kSize, kPieces = kNarrow / kSize;
  int cols = p.ranges.cols, ranks = p.gates.up.experts * p.rank;
  bool aligned = p.up_aligned && p.rank % kSize == 0;
  for (int i = threadIdx.x; i < kInner<T> * kPieces; i += kTileThreads) {
    int col = k0 + i / kPieces, at = rank0 + i % kPieces * kSize;
    T* target = right + i / kPieces * pitch_of<T>(kNarrow) + i % kPieces * kSize;
    auto from = [&](int number) {
      int expert = static_cast<int>(p.by_rank.quotient(number));
      int64_t range = static_cast<int64_t>(expert) * p.ranges.groups + group;
      return p.up + (range * cols + col) * p.rank + number - expert * p.rank;
    };
    if (aligned && col < cols && at + kSize <= ranks) {
      copy_async(target, from(at));
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < kSize; ++e) {
      target[e] = col < cols && at + e < ranks ? *from(at + e) : from_float<T>(0.f);
    }
  }
}

// What the weights' gradients are sums of, and the gates' gradient, of one row. All lanes of a warp call.
template <typename T>
ADAMIX_DEVICE void leave_row(const GatedInputGrad<T>& p, const GatedTile<T>& tile, int row) {
  const Gates& gates = p.gates;
  int number = static_cast<int>(tile.first) + row;
  int64_t at = gates.at(number), slots = gates.slots;
  bool served = tile.served[row] != 0;
  for (int slot = this_lane(); p.down_ids != nullptr && slot < gates.down.slots; slot += 32) {
    p.down_ids[static_cast<int64_t>(number) * gates.down.slots + slot] =
        served ? gates.down.named(at + slot, slot) : -1;
  }
  for (int slot = this_lane(); p.up_ids != nullptr && slot < gates.up.slots; slot += 32) {
    p.up_ids[static_cast<int64_t>(number) * gates.up.slots + slot] = served ? gates.up.named(at + slot, slot) : -1;
  }
  float* sums = p.dgates == nullptr ? nullptr : tile.sums + this_warp() * gates.slots;
  if (served && p.u != nullptr) {
    const T* grad_out = p.grad_out.data + tile.in_offset[row] + p.ranges.start[0];
    unmix_row(p, number, p.t, p.u, grad_out, p.dt, sums);
  }
  for (int slot = this_lane(); sums != nullptr && slot < gates.slots; slot += 32) {
    store_scalar(p.dgates, p.dgates_kind, number * slots + slot, served ? sums[slot] : not_a_number());
  }
  int64_t slot0 = static_cast<int64_t>(number) * gates.up.slots;
  if (served) {
    mix_row(p, number, p.t, p.mixed == nullptr ? nullptr : p.mixed + slot0 * p.ranks(),
            p.bias_gates == nullptr ? nullptr : p.bias_gates + slot0);
  }
  __syncwarp();
}

template <typename T>
ADAMIX_BOTH int kept_cols_of(const GatedInputGrad<T>& p) {
  return p.dx == nullptr ? 0 : kept_cols<T>(p.gates.down, p.ranks(), false);
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2) gated_input_grad_kernel(GatedInputGrad<T> p) {
  SharedMemory memory;
  GatedTile<T> tile(memory, p.gates, kept_cols_of(p));
  tile.find(p.rows, p.grad_out, p.grad_out, p.gates);
  DropoutMask mask(p.dropout);
  int64_t first = tile.first;
  int ranks = p.ranks(), slots = p.gates.up.slots;

  for (int group = 0; p.u != nullptr && group < p.ranges.groups; ++group) {
    int cols = p.ranges.cols, start = p.ranges.start[group];
    gather<T, Inner::kStrided>(
        tile, p.gates, p.gates.up, tile.up, cols, p.rank, p.by_rank,
        [&](T* left, int k0) {
          load_tile<kTileRows, kInner<T>, kTileThreads>(
              left, p.grad_out.data + start + k0, [&](int row) { return tile.in_offset[row]; },
              [&](int row) { return row < tile.count; }, cols - k0, p.grad_out.aligned && start % Piece<T>::kSize == 0);
        },
        [](T*, int) {}, [&](T* right, int k0, int rank0) { load_up_ranks(right, p, group, k0, rank0); },
        [&](int row, int slot, int, int rank, float sum) {
          p.u[((first + row) * slots + slot) * ranks + group * p.rank + rank] = from_float<T>(sum);
        });
  }
  __syncthreads();
  for (int row = this_warp(); row < tile.count; row += kTileThreads / 32) leave_row(p, tile, row);
  if (p.dx == nullptr) return;
  __syncthreads();

  spread<T, Inner::kStrided>(
      tile, p.gates, p.gates.down, tile.down, p.dt, ranks, 0, ranks, p.by_ranks, static_cast<const T*>(nullptr), false,
      p.features,
      [&](T* right, int col0, int expert, int experts, int k0) {
        load_matrix<kInner<T>, GatedTile<T>::kNarrow>(right, p.down + static_cast<int64_t>(expert) * ranks * p.features,
                                                      k0, experts * ranks, col0, p.features, p.down_aligned);
      },
      [&](int row, int col, int valid, const float* sums) {
        Piece<T> added{}, piece;
        if (p.add_input) {
          added = load_piece(p.grad_out.data + tile.added_offset[row] + col, valid, p.grad_out.aligned);
        }
#pragma unroll
        for (int e = 0; e < Piece<T>::kSize; ++e) {
          float value = mask.drops() ? mask.apply(sums[e], first + row, col + e) : sums[e];
          piece.values[e] = from_float<T>(p.add_input ? value + to_float(added.values[e]) : value);
        }
        if (!tile.served[row]) {
#pragma unroll
          for (int e = 0; e < Piece<T>::kSize; ++e) piece.values[e] = from_float<T>(not_a_number());
        }
        store_piece(p.dx + (first + row) * p.features + col, piece, valid, p.dx_aligned);
      });
}

template <typename T, int Narrow>
__global__ void __launch_bounds__(kTileThreads, 2) gated_weight_grad_kernel(GatedWeightGrad<T> p) {
  SharedMemory memory;
  GradTile<T, Narrow> tile(memory);
  DropoutMask mask(p.dropout);
  GradSide<T> side = p.side[0];
  int number = blockIdx.x, pairs = p.pairs[0], which = 0;
#pragma unroll
  for (int next = 1; next < 3; ++next) {
    int jobs = blocks_of_side(side, Narrow);
    if (which != next - 1 || number < jobs) continue;
    number -= jobs, which = next, side = p.side[next], pairs = p.pairs[next];
  }
  auto change = [&](T* wide, auto row_of, int col0) {
    if (which != 0 || !mask.drops()) return;
    change_tile<kInner<T>, kTileCols, kTileThreads>(
        wide, [&](float value, int row, int col) { return mask.apply(value, row_of(row), col0 + col); });
  };
  auto from_start = [&](int group) {
    if (which != 1) return;
    int start = p.ranges.start[group % p.ranges.groups];
    side.wide.data += start;
    side.wide.aligned = side.wide.aligned && start % Piece<T>::kSize == 0;
  };
  if (is_dense(side)) {
    from_start(number / (blocks_of_side(side, Narrow) / side.groups));
    dense_grad(tile, side, number, p.shares,
               [&](T* wide, int64_t first, int col0) { change(wide, [&](int row) { return first + row; }, col0); });
    return;
  }
  GradJob job = job_of<T, Narrow>(side, number);
  from_start(job.group);
  RowShares shares = p.shares;
  shares.rows *= pairs, shares.rows_a_share *= pairs;
  weight_grad(
      tile, side, job, shares, 1.f,
      [&](T* wide, auto row_of) { change(wide, [&](int row) { return row_of(row) / pairs; }, job.col0); }, [](T*) {});
}

#define ADAMIX_INSTANTIATE(T)                                                           \
  template __global__ void gated_input_grad_kernel<T>(GatedInputGrad<T>);               \
  template __global__ void gated_weight_grad_kernel<T, kSmallRank>(GatedWeightGrad<T>); \
  template __global__ void gated_weight_grad_kernel<T, kChunk<T>>(GatedWeightGrad<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_gated_input_grad(const GatedInputGrad<T>& params, const Device& device) {
  Shape shape{dim3(count_tiles(params.rows)), kTileThreads,
              shared_bytes<GatedTile<T>>(params.gates, kept_cols_of(params))};
  launch("gated_input_grad", gated_input_grad_kernel<T>, shape, device, params);
}

template <typename T>
size_t gated_grad_block_bytes(int ranks) {
  size_t bytes = 0;
  dispatch_narrow<T>(ranks, [&](auto narrow) { bytes = shared_bytes<GradTile<T, decltype(narrow)::value>>(); });
  return bytes;
}

template <typename T>
void launch_gated_weight_grad(const GatedWeightGrad<T>& params, const Device& device) {
  int most = 0;
  for (const GradSide<T>& side : params.side) most = side.experts > 0 ? max_of(most, joined_ranks(side)) : most;
  auto run = [&](auto narrow) {
    constexpr int kNarrow = decltype(narrow)::value;
    int jobs = 0;
    for (const GradSide<T>& side : params.side) jobs += blocks_of_side(side, kNarrow);
    launch("gated_weight_grad", gated_weight_grad_kernel<T, kNarrow>,
           {dim3(jobs, params.shares.count), kTileThreads, shared_bytes<GradTile<T, kNarrow>>()}, device, params);
  };
  dispatch_narrow<T>(most, run);
}

#define ADAMIX_INSTANTIATE(T)                                                     \
  template size_t gated_grad_block_bytes<T>(int);                                 \
  template void launch_gated_input_grad(const GatedInputGrad<T>&, const Device&); \
  template void launch_gated_weight_grad(const GatedWeightGrad<T>&, const Device&);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE
#endif

}  // namespace adamix
