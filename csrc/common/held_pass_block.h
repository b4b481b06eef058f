// A block of held_pass.h: a tile's rows, its products, its part of the weight gradients.
#pragma once

#include "common/held_pass.h"
#include "common/one_pass_block.h"
#include "common/piece.h"
#include "common/warp_tile.h"

namespace adamix {

template <typename T, bool Lora>
struct HeldPassBlock {
  using Memory = HeldPassMemory<T>;
  using Tile = WarpTile<T>;
  static constexpr int kPitch = Memory::kPitch, kRight = Memory::kRightPitch;
  const OnePass<T>& p;
  const Memory& memory;
  int warp, lane, col0;    // col0: of the warp
  int row, part;           // of the lane's 8 elements of 16 x 16
  int own_row, own_piece;  // of its 8 elements of 4 rows of the warp's columns
  T *stage, *weights;      // the warp's
  float* sums;             // the warp's
  DropoutMask mask;
  Tile of_down[4], of_up[4];  // 16 ranks by 64 columns
  float up_bias[8];           // of the columns of own_piece, over the lane's rows
  float down_bias[2];         // of the lane's two ranks, in the first 128 threads
  uint4 ahead[4];             // the next tile, under way: rows own_row + 4 i
  int down_now, up_now;       // whose sums are held

  ADAMIX_DEVICE HeldPassBlock(const OnePass<T>& params, const Memory& shared)
      : p(params),
        memory(shared),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        col0(warp * kPassCols),
        row(lane / 2),
        part(lane % 2 * 8),
        own_row(lane / 8),
        own_piece(lane % 8 * 8),
        stage(shared.stages + warp * Memory::kTile),
        weights(shared.weights + warp * Memory::kTile),
        sums(shared.sums + warp * Memory::kSums),
        mask(params.dropout),
        down_bias{0.f, 0.f},
        down_now(kNoExpert),
        up_now(kNoExpert) {
    clear(of_down), clear(of_up);
#pragma unroll
    for (float& sum : up_bias) sum = 0.f;
  }
  static ADAMIX_DEVICE void clear(Tile (&tiles)[4]) {
#pragma unroll
    for (Tile& tile : tiles) tile.zero();
  }

  ADAMIX_DEVICE PassTile place(int tile) const {
    int sample = static_cast<int>(p.tiles_a_sample.quotient(tile));
    int token = (tile - sample * static_cast<int>(p.tiles_a_sample.by)) * kFragmentRows, left = p.tokens - token;
    return {sample, token, sample * p.tokens + token, left < kFragmentRows ? left : kFragmentRows};
  }

  // Loads the warp's columns of a tile, zeros behind the last row.
  ADAMIX_DEVICE void fetch(const Rows<const T>& from, const PassTile& tile) {
    const T* at = from.data + tile.sample * from.batch_stride + (tile.token + own_row) * from.token_stride;
    at += col0 + own_piece;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool there = own_row + 4 * i < tile.count;
      ahead[i] = there ? load_words<uint4>(at + 4 * i * from.token_stride) : uint4{0, 0, 0, 0};
    }
  }

  // The stage = what is under way; complete for the warp on return.
  ADAMIX_DEVICE void take() const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) store_words(stage + (own_row + 4 * i) * kPitch + own_piece, ahead[i]);
    __syncwarp();
  }

  // Zero in the place of what is dropped of a tile of x that is under way.
  ADAMIX_DEVICE void drop() {
    if (!Lora || !mask.drops()) return;
    DropoutMask::EightColumns columns(col0 + own_piece);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      TwoWords keys = memory.keys[own_row + 4 * i];
      ahead[i] = mask.kept(ahead[i], {keys.at[0], keys.at[1]}, columns);
    }
  }

  // The weights of another expert of the down side; complete for the warp on return.
  ADAMIX_DEVICE void take_weights(int expert) {
    const T* from = p.down_weight + (static_cast<int64_t>(expert) * p.rank + own_row) * p.hidden + col0 + own_piece;
    __syncwarp();
#pragma unroll 1
    for (int rank = own_row; rank < kFragmentRanks; rank += 4, from += 4 * p.hidden) {
      uint4 piece = rank < p.rank ? load_words<uint4>(from) : uint4{0, 0, 0, 0};
      store_words(weights + rank * kPitch + own_piece, piece);
    }
    __syncwarp();
  }

  ADAMIX_DEVICE void poison(const PassTile& tile) const {
    if (p.dx == nullptr) return;
    for (int of = warp; of < tile.count; of += static_cast<int>(blockDim.x) / 32) {
      for (int col = lane; col < p.hidden; col += 32) {
        p.dx[static_cast<int64_t>(tile.first + of) * p.hidden + col] = from_float<T>(not_a_number());
      }
    }
  }

  // memory.narrow of the tile, from the warps' parts of grad_out Wu; complete on return.
  ADAMIX_DEVICE void narrow(const PassTile& tile) {
    // Two ranks of a row for each of the first 128 threads.
    int of = threadIdx.x / 8, rank = static_cast<int>(threadIdx.x) % 8 * 2;
    bool joins = threadIdx.x < 128, mine = joins && of < tile.count && rank < p.rank;
    uint32_t value = 0;
    if (mine) value = load_words<uint32_t>(p.narrow + static_cast<int64_t>(tile.first + of) * p.rank + rank);
    Tile sum[1];
    sum[0].zero();
    bool inside = part < p.rank;
    const T* weight = p.up_weight + static_cast<int64_t>(up_now) * p.hidden * p.rank + (col0 + row) * p.rank + part;
    uint4 pieces[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      pieces[n] = inside ? load_words<uint4>(weight + 16 * n * p.rank) : uint4{0, 0, 0, 0};
    }
    if (!Lora && p.need_up) add_up_bias();
    T* right = reinterpret_cast<T*>(sums);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      store_words(right + row * kRight + part, pieces[n]);
      __syncwarp();
      Tile::template add_products<Inner::kContiguous, Inner::kStrided>(sum, stage + 16 * n, kPitch, right, kRight);
      __syncwarp();
    }
    sum[0].store(sums, Memory::kSumsPitch);
    __syncthreads();
    if (joins) {
      const float* from = memory.sums + of * Memory::kSumsPitch + rank;
      PassPair all = load_words<PassPair>(from);
      int warps = blockDim.x / 32;
#pragma unroll 4
      for (int other = 1; other < warps; ++other) {
        PassPair one = load_words<PassPair>(from + other * Memory::kSums);
        all = {all.low + one.low, all.high + one.high};
      }
      uint32_t slope = 0;  // rows and ranks that are not there: whatever the sums
      if (mine) {
        if constexpr (Lora) {
          slope = word_of<T>(p.scaling * all.low, p.scaling * all.high);
        } else {
          Activated low = activated(p.activation, low_of<T>(value)), high = activated(p.activation, high_of<T>(value));
          slope = word_of<T>(all.low * low.slope, all.high * high.slope);
          value = word_of<T>(low.value, high.value);
          down_bias[0] += low_of<T>(slope), down_bias[1] += high_of<T>(slope);
        }
      }
      store_words(memory.narrow + of * kRight + rank, slope);
      store_words(memory.narrow + Memory::kNarrow + of * kRight + rank, value);
    }
    if (Lora && mask.drops() && warp == 0 && lane < kFragmentRows) {
      DropoutMask::RowKeys keys = mask.of_row(tile.first + lane);
      memory.keys[lane] = TwoWords{{keys.factor, keys.offset}};
    }
    __syncthreads();
  }

  // += the sums of grad_out's columns.
  ADAMIX_DEVICE void add_up_bias() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Words piece = load_words<Words>(stage + (own_row + 4 * i) * kPitch + own_piece);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        up_bias[2 * e] += low_of<T>(piece.at[e]);
        up_bias[2 * e + 1] += high_of<T>(piece.at[e]);
      }
    }
  }

  // dx = dpre Wd (+ grad_out) of the tile, zero where it is dropped.
  ADAMIX_DEVICE void wide(const PassTile& tile) const {
    if (p.dx == nullptr) return;
    T* to = p.dx + static_cast<int64_t>(tile.first + row) * p.hidden + col0 + part;
    bool drops = Lora && mask.drops();
    float scale = drops ? p.dropout.scale : 1.f;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      Tile sum[1];
      sum[0].zero();
      Tile::template add_products<Inner::kContiguous, Inner::kStrided>(sum, memory.narrow, kRight, weights + 16 * n,
                                                                       kPitch);
      sum[0].store(sums, Memory::kSumsPitch);
      __syncwarp();
      const float* from = sums + row * Memory::kSumsPitch + part;
      uint4 old{0, 0, 0, 0};
      if (!Lora && p.add_input) old = load_words<uint4>(stage + row * kPitch + 16 * n + part);
      auto pair = [&](int e, uint32_t more) {
        if constexpr (Lora) return word_of<T>(from[e] * scale, from[e + 1] * scale);
        return word_of<T>(from[e] + low_of<T>(more), from[e + 1] + high_of<T>(more));
      };
      uint4 piece{pair(0, old.x), pair(2, old.y), pair(4, old.z), pair(6, old.w)};
      if (drops) {
        TwoWords keys = memory.keys[row];
        piece = mask.kept(piece, {keys.at[0], keys.at[1]}, DropoutMask::EightColumns(col0 + 16 * n + part));
      }
      if (row < tile.count) store_whole(to + 16 * n, piece);
      __syncwarp();
    }
  }

  // The tile's part of a side's weight gradient.
  ADAMIX_DEVICE void add_up() {
    if (!p.need_up) return;
    Tile::template add_products<Inner::kStrided, Inner::kStrided>(of_up, memory.narrow + Memory::kNarrow, kRight, stage,
                                                                  kPitch);
  }
  ADAMIX_DEVICE void add_down() {
    if (!p.need_down) return;
    Tile::template add_products<Inner::kStrided, Inner::kStrided>(of_down, memory.narrow, kRight, stage, kPitch);
  }

  // plane[rank][col] = a side's sums, or += them; through the warp's place for sums.
  ADAMIX_DEVICE void leave(float* plane, bool fresh, const Tile (&tiles)[4]) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      __syncwarp();
      tiles[n].store(sums, Memory::kSumsPitch);
      __syncwarp();
      if (row >= p.rank) continue;
      float* to = plane + static_cast<int64_t>(row) * p.hidden + col0 + 16 * n + part;
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        Piece<float> sum = *reinterpret_cast<const Piece<float>*>(sums + row * Memory::kSumsPitch + part + e);
        if (!fresh) {
          Piece<float> held = *reinterpret_cast<const Piece<float>*>(to + e);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum.values[i] += held.values[i];
        }
        *reinterpret_cast<Piece<float>*>(to + e) = sum;
      }
    }
  }

  // bias[i] = the block's sums of a side's bias, or += them. All threads call.
  ADAMIX_DEVICE void leave_down_bias(float* bias, bool fresh) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = over_rows(down_bias[i]);
      if (threadIdx.x < 128 && lane < 8) memory.sums[warp * kFragmentRanks + lane * 2 + i] = sum;
      down_bias[i] = 0.f;
    }
    __syncthreads();
    int rank = threadIdx.x;
    if (rank >= p.rank) return;
    float sum = fresh ? 0.f : bias[rank];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += memory.sums[i * kFragmentRanks + rank];
    bias[rank] = sum;
  }
  ADAMIX_DEVICE void leave_up_bias(float* bias, bool fresh) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float sum = over_rows(up_bias[e]);
      float* to = bias + col0 + own_piece + e;
      if (lane < 8) *to = fresh ? sum : *to + sum;
      up_bias[e] = 0.f;
    }
  }
  // Over the lanes 8 apart.
  static ADAMIX_DEVICE float over_rows(float sum) {
    sum += shuffle_xor(sum, 8);
    return sum + shuffle_xor(sum, 16);
  }
};

}  // namespace adamix
