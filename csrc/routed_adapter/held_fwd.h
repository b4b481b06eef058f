// The forward on tiles of rows held in shared memory, for GPUs without the products of common/fragments.h (V100): x is
// read once, and is there again when it is added to the result.
#pragma once

#include "common/copy.h"
#include "common/piece.h"
#include "routed_adapter/resident_tile.h"
#include "routed_adapter/routed_adapter.h"

namespace adamix {

constexpr int kHeldGroups = 2;  // of 16 rows: each warp multiplies both by weights that it loads once
constexpr int kHeldRows = 16 * kHeldGroups;
constexpr int kHeldWarps = 16;
constexpr int kHeldStep = 16 * kHeldWarps;  // columns that all warps take at a time, 16 each
constexpr int kHeldAhead = 4;               // steps whose weights are under way
// Columns of a warp's sums and of its weights, of which 16 are used: against bank conflicts.
constexpr int kHeldPitch = 20, kHeldWeights = 24, kHeldSums = 16 * kHeldPitch;

template <typename T>
struct HeldMemory {
  T* rows;      // [kHeldRows, pitch]
  T* narrow;    // [kHeldRows, narrow_pitch]
  float* sums;  // [kHeldWarps, 16, kHeldPitch]; before, in the same place, weights [16, kHeldWeights]
  int* narrow_expert;
  int* wide_expert;
  int pitch, narrow_pitch;

  template <typename Memory>
  ADAMIX_BOTH HeldMemory(Memory& memory, int hidden, int rank)
      : pitch(pitch_of<T>(hidden)), narrow_pitch(pitch_of<T>(round_up(rank, 16))) {
    rows = memory.template take<T>(kHeldRows * pitch);
    narrow = memory.template take<T>(kHeldRows * narrow_pitch);
    sums = memory.template take<float>(kHeldWarps * kHeldSums);
    narrow_expert = memory.template take<int>(kHeldRows);
    wide_expert = memory.template take<int>(kHeldRows);
  }
};

// One block's tile. Products are transposed: a warp's sums are of 16 ranks or columns by 16 rows.
template <typename T>
struct HeldTile {
  const RoutedAdapterForward<T>& p;
  const HeldMemory<T>& memory;
  int64_t first;
  int count, warp, lane, col0;  // col0: of the warp
  int row, part;                // of the lane's 16 bytes in 16 x 16 elements

  ADAMIX_DEVICE HeldTile(const RoutedAdapterForward<T>& params, const HeldMemory<T>& shared)
      : p(params), memory(shared), first(static_cast<int64_t>(blockIdx.x) * kHeldRows) {
    count = p.rows - first < kHeldRows ? static_cast<int>(p.rows - first) : kHeldRows;
    warp = this_warp(), lane = this_lane(), col0 = warp * 16;
    row = lane / 2, part = lane % 2 * 8;
  }

  // The warp's.
  ADAMIX_DEVICE float* sums() const { return memory.sums + warp * kHeldSums; }

  // x's rows; complete after a barrier.
  ADAMIX_DEVICE void load() const {
    constexpr int kRows = kHeldRows / kHeldWarps, kPieces = 4;
    for (int piece = lane; piece < p.hidden / 8; piece += 32 * kPieces) {
      uint4 pieces[kRows][kPieces];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        int of = warp + i * kHeldWarps;
        const T* from = p.x.data + p.x.offset(static_cast<int>(first) + (of < count ? of : 0));
#pragma unroll
        for (int k = 0; k < kPieces; ++k) {
          int at = piece + 32 * k;
          bool there = of < count && at < p.hidden / 8;
          pieces[i][k] = there ? load_words<uint4>(from + 8 * at) : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int k = 0; k < kPieces; ++k) {
          int at = piece + 32 * k;
          if (at < p.hidden / 8)
            store_words(memory.rows + (warp + i * kHeldWarps) * memory.pitch + 8 * at, pieces[i][k]);
        }
      }
    }
  }

  // sum += weights [16, 16], of which the lane has 16 bytes, times the transposed rows.
  ADAMIX_DEVICE void multiply_by(WarpTile<T> (&sum)[kHeldGroups], const T* rows, int pitch, uint4 piece) const {
    T* weights = reinterpret_cast<T*>(sums());
    store_words(weights + row * kHeldWeights + part, piece);
    __syncwarp();
    WarpTile<T>::template add_products<Inner::kContiguous, Inner::kContiguous>(sum, weights, kHeldWeights, rows, pitch);
    __syncwarp();
  }

  // pre and memory.narrow, of the expert's rows and 16 ranks from rank0 on; complete on return.
  ADAMIX_DEVICE void narrow(const ResidentExperts& experts, int expert, int rank0) const {
    WarpTile<T> sum[kHeldGroups];
#pragma unroll
    for (WarpTile<T>& of : sum) of.zero();
    bool inside = rank0 + row < p.rank;
    const T* bank = p.down_weight + static_cast<int64_t>(expert) * p.rank * p.hidden;
    const T* weight = bank + static_cast<int64_t>(inside ? rank0 + row : 0) * p.hidden + part;
    for (int col = col0; col < p.hidden; col += kHeldAhead * kHeldStep) {
      uint4 pieces[kHeldAhead];
#pragma unroll
      for (int n = 0; n < kHeldAhead; ++n) {
        int at = col + n * kHeldStep;
        pieces[n] = inside && at < p.hidden ? load_words<uint4>(weight + at) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int n = 0; n < kHeldAhead; ++n) {
        int at = col + n * kHeldStep;
        if (at < p.hidden) multiply_by(sum, memory.rows + at, memory.pitch, pieces[n]);
      }
    }
#pragma unroll
    for (int group = 0; group < kHeldGroups; ++group) {
      sum[group].store(sums(), kHeldPitch);
      __syncthreads();
      join_parts(experts, expert, rank0, group);
      __syncthreads();
    }
  }

  // The sum of the warps' parts for a group of rows, by the first 256 threads.
  ADAMIX_DEVICE void join_parts(const ResidentExperts& experts, int expert, int rank0, int group) const {
    int of = group * 16 + static_cast<int>(threadIdx.x) / 16, own = threadIdx.x % 16, rank = rank0 + own;
    if (threadIdx.x >= 256 || of >= count || (experts.mixed && experts.narrow[of] != expert)) return;
    T* word = memory.narrow + of * memory.narrow_pitch + rank;
    if (rank >= p.rank) {
      *word = from_float<T>(0.f);
      return;
    }
    const float* from = memory.sums + own * kHeldPitch + of % 16;
    float sum = 0.f;
#pragma unroll
    for (int share = 0; share < kHeldWarps; ++share) sum += from[share * kHeldSums];
    if (p.down_bias != nullptr) sum += to_float(p.down_bias[static_cast<int64_t>(expert) * p.rank + rank]);
    T pre = from_float<T>(sum);
    p.pre[(first + of) * p.rank + rank] = pre;
    *word = from_float<T>(activate(p.activation, to_float(pre)));
  }

  // out = residual + narrow Wu^T + bias, of the expert's rows.
  ADAMIX_DEVICE void wide(const ResidentExperts& experts, int expert) const {
    int64_t size = static_cast<int64_t>(p.hidden) * p.rank;
    const T* weight = p.up_weight + expert * size + part;
    const T* bias = p.up_bias == nullptr ? nullptr : p.up_bias + static_cast<int64_t>(expert) * p.hidden;
    bool own = p.residual.data == p.x.data;
    auto load = [&](int col, int rank0) {
      bool inside = col < p.hidden && rank0 + part < p.rank;
      return inside ? load_words<uint4>(weight + (col + row) * p.rank + rank0) : uint4{0, 0, 0, 0};
    };
    uint4 next = load(col0, 0);
    for (int col = col0; col < p.hidden; col += kHeldStep) {
      WarpTile<T> sum[kHeldGroups];
#pragma unroll
      for (WarpTile<T>& of : sum) of.zero();
      uint4 shift{0, 0, 0, 0};
      if (bias != nullptr) shift = load_words<uint4>(bias + col + part);
      for (int rank0 = 0; rank0 < p.rank; rank0 += 16) {
        uint4 piece = next;
        bool last = rank0 + 16 >= p.rank;
        next = load(last ? col + kHeldStep : col, last ? 0 : rank0 + 16);
        multiply_by(sum, memory.narrow + rank0, memory.narrow_pitch, piece);
      }
#pragma unroll
      for (int group = 0; group < kHeldGroups; ++group) {
        int of = group * 16 + row;
        bool mine = of < count && (!experts.mixed || experts.wide[of] == expert);
        uint4 old{0, 0, 0, 0};
        if (own) {
          old = load_words<uint4>(memory.rows + of * memory.pitch + col + part);
        } else if (mine && p.residual.data != nullptr) {
          old = load_words<uint4>(p.residual.data + p.residual.offset(static_cast<int>(first) + of) + col + part);
        }
        sum[group].store(sums(), kHeldPitch);
        __syncwarp();
        const float* from = sums() + part * kHeldPitch + row;
        auto pair = [&](int e, uint32_t more, uint32_t most) {
          return word_of<T>(from[e * kHeldPitch] + low_of<T>(more) + low_of<T>(most),
                            from[(e + 1) * kHeldPitch] + high_of<T>(more) + high_of<T>(most));
        };
        if (mine) {
          store_whole(p.out + (first + of) * p.hidden + col + part, {pair(0, shift.x, old.x), pair(2, shift.y, old.y),
                                                                     pair(4, shift.z, old.z), pair(6, shift.w, old.w)});
        }
        __syncwarp();
      }
    }
  }

  // NaN in columns [0, cols) of out's rows that no expert serves.
  ADAMIX_DEVICE void poison(const ResidentExperts& experts, T* out, int cols) const {
    if (experts.one()) return;
#pragma unroll 1
    for (int of = warp; of < count; of += kHeldWarps) {
      if (experts.narrow[of] != kNoExpert) continue;
#pragma unroll 1
      for (int col = lane; col < cols; col += 32) out[(first + of) * cols + col] = from_float<T>(not_a_number());
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(32 * kHeldWarps) routed_adapter_held_forward_kernel(RoutedAdapterForward<T> p) {
#if ADAMIX_ARCH < 750
  SharedMemory shared;
  HeldMemory<T> memory(shared, p.hidden, p.rank);
  HeldTile<T> tile(p, memory);
  tile.load();
  ResidentExperts experts;
  experts.find(memory, kHeldRows, static_cast<int>(tile.first), tile.count, p.down, p.up);
  for (int expert = -1;;) {
    expert = experts.next(experts.narrow, experts.first_narrow, kHeldRows, expert);
    if (expert == kNoExpert) break;
    for (int rank0 = 0; rank0 < p.rank; rank0 += 16) tile.narrow(experts, expert, rank0);
  }
  for (int expert = -1;;) {
    expert = experts.next(experts.wide, experts.first_wide, kHeldRows, expert);
    if (expert == kNoExpert) break;
    tile.wide(experts, expert);
  }
  tile.poison(experts, p.pre, p.rank);
  tile.poison(experts, p.out, p.hidden);
#endif
}

}  // namespace adamix
