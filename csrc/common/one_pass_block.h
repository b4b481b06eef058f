// A block of one_pass.h: copies of a tile, its products, its part of the weight gradients.
#pragma once

#include "common/one_pass_sums.h"

namespace adamix {

// Rows [first, first + count) of one sample, rows token on of it.
struct PassTile {
  int sample, token, first, count;
};

template <typename T, bool Lora, bool Keeps>
struct PassBlock {
  static constexpr int kTile = PassMemory<T>::kTile;
  static constexpr int kNarrow = kFragmentRows * kFragmentRanks;
  const OnePass<T>& p;
  const PassMemory<T>& memory;
  int warp, lane, warps, col0;  // col0: of the lane
  T* stages;                    // the warp's
  const T *next_grad, *next_x;  // where the lane's copies of the next tile begin
  T* dx;                        // row fragment_row(), columns from col0 on
  int own_place;                // of the lane's piece of a wide tile
  int own;                      // see load_tiles: of a wide tile
  int own_narrow, own_turned;   // of a narrow one
  int own_sums;                 // of the lane's sums of a narrow one
  DropoutMask mask;
  PassSums of_down, of_up;
  PassColumnSums up_bias;
  float down_bias[2];    // of the lane's two ranks, in the first 128 threads
  int down_now, up_now;  // whose sums are held

  ADAMIX_DEVICE PassBlock(const OnePass<T>& params, const PassMemory<T>& shared)
      : p(params),
        memory(shared),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        warps(blockDim.x / 32),
        mask(params.dropout),
        down_bias{0.f, 0.f},
        down_now(kNoExpert),
        up_now(kNoExpert) {
    stages = memory.stages + warp * 4 * kTile;
    col0 = warp * kPassCols + fragment_part() * 8;
    next_grad = next_x = nullptr;
    dx = p.dx + static_cast<int64_t>(fragment_row()) * p.hidden + col0;
    own_place = pass_place(fragment_row(), fragment_part());
    own = pass_place(tile_row<0>(), tile_piece<0>());
    own_narrow = narrow_place(tile_row<0>(), tile_piece<0>());
    own_turned = narrow_place(tile_row<1>(), tile_piece<1>());
    own_sums = (warp * kFragmentRows + fragment_row()) * kFragmentRanks + fragment_part() * 4;
    hold(dx), hold(own), hold(own_place), hold(own_narrow), hold(own_turned), hold(own_sums);
    of_down.clear(), of_up.clear(), up_bias.clear();
  }

  ADAMIX_DEVICE PassTile place(int tile) const {
    int sample = static_cast<int>(p.tiles_a_sample.quotient(tile));
    return at(sample, (tile - sample * static_cast<int>(p.tiles_a_sample.by)) * kFragmentRows);
  }
  ADAMIX_DEVICE PassTile at(int sample, int token) const {
    int left = p.tokens - token;
    return {sample, token, sample * p.tokens + token, left < kFragmentRows ? left : kFragmentRows};
  }
  ADAMIX_DEVICE PassTile after(const PassTile& tile) const {
    int left = p.tokens - tile.token - kFragmentRows;
    if (left <= 0) return at(tile.sample + 1, 0);
    return {tile.sample, tile.token + kFragmentRows, tile.first + kFragmentRows,
            left < kFragmentRows ? left : kFragmentRows};
  }

  // The next tile's copies are those of a tile of another sample than the last one's.
  ADAMIX_DEVICE void seek(const PassTile& tile) {
    next_grad = begin_of(p.grad_out, tile);
    if (p.need_down) next_x = begin_of(p.x, tile);
  }
  ADAMIX_DEVICE const T* begin_of(const Rows<const T>& from, const PassTile& tile) const {
    return from.data + tile.sample * from.batch_stride + (tile.token + fragment_row()) * from.token_stride + col0;
  }

  // Starts the copies of a tile: the warp's columns, rows of zeros behind the last.
  ADAMIX_DEVICE void load(T* stage, const PassTile& tile) {
    copy(stage, next_grad, p.grad_out, tile.count);
    if (p.need_down) copy(stage + kTile, next_x, p.x, tile.count);
  }
  ADAMIX_DEVICE void copy(T* stage, const T*& from, const Rows<const T>& rows, int count) const {
    pass_copy(stage, own_place, from, from + 8 * rows.token_stride, count - fragment_row());
    from += kFragmentRows * rows.token_stride;
  }

  ADAMIX_DEVICE void poison(const PassTile& tile) const {
    if (p.dx == nullptr) return;
    for (int row = warp; row < tile.count; row += warps) {
      for (int col = lane; col < p.hidden; col += 32) {
        p.dx[static_cast<int64_t>(tile.first + row) * p.hidden + col] = from_float<T>(not_a_number());
      }
    }
  }

  // memory.narrow of the tile, from the warps' parts of grad_out Wu; complete on return.
  ADAMIX_DEVICE void narrow(const T* dy, const PassTile& tile, const PassWeights<T, Keeps, true>& weights) {
    // Two ranks of a row for each of the first 128 threads.
    int own_row = threadIdx.x / 8, own_rank = static_cast<int>(threadIdx.x) % 8 * 2;
    bool joins = threadIdx.x < 128, mine = false;
    uint32_t value = 0;
    if (joins) {
      mine = own_row < tile.count && own_rank < p.rank;
      if (mine) value = load_words<uint32_t>(p.narrow + static_cast<int64_t>(tile.first + own_row) * p.rank + own_rank);
    }
    float sums[2][4] = {};
    copy_wait<1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      load_tiles(a, dy, own, 2 * i, pass_place);
      Words b = weights.get(i);
      multiply<T>(sums[0], a[0], a[1], a[2], a[3], b.at[0], b.at[1]);
      multiply<T>(sums[1], a[0], a[1], a[2], a[3], b.at[2], b.at[3]);
    }
    float* to = memory.sums + own_sums;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Piece<float> piece{{sums[0][2 * half], sums[0][2 * half + 1], sums[1][2 * half], sums[1][2 * half + 1]}};
      *reinterpret_cast<Piece<float>*>(to + half * 8 * kFragmentRanks) = piece;
    }
    __syncthreads();
    if (joins) {
      const float* from = memory.sums + threadIdx.x * 2;
      PassPair sum = load_words<PassPair>(from);
#pragma unroll 4
      for (int other = 1; other < warps; ++other) {
        PassPair part = load_words<PassPair>(from + other * kFragmentRows * kFragmentRanks);
        sum = {sum.low + part.low, sum.high + part.high};
      }
      uint32_t slope = 0;  // rows and ranks that are not there: whatever the sums
      if (mine) {
        if constexpr (Lora) {
          slope = word_of<T>(p.scaling * sum.low, p.scaling * sum.high);
        } else {
          Activated low = activated(p.activation, low_of<T>(value)), high = activated(p.activation, high_of<T>(value));
          slope = word_of<T>(sum.low * low.slope, sum.high * high.slope);
          value = word_of<T>(low.value, high.value);
          down_bias[0] += low_of<T>(slope), down_bias[1] += high_of<T>(slope);
        }
      }
      T* place = memory.narrow + narrow_place(own_row, own_rank / 8) + own_rank % 8;
      store_words(place, slope);
      store_words(place + kNarrow, value);
    }
    if (Lora && mask.drops() && warp == warps - 1 && lane < kFragmentRows) {
      DropoutMask::RowKeys keys = mask.of_row(tile.first + lane);
      memory.keys[lane] = TwoWords{{keys.factor, keys.offset}};
    }
    __syncthreads();
  }

  // dx = dpre Wd (+ grad_out) of the tile; dropout in dx and in the tile of x.
  ADAMIX_DEVICE void wide(T* dy, const PassTile& tile, const PassWeights<T, Keeps, false>& weights) {
    uint32_t a[4];
    load_tiles(a, memory.narrow, own_narrow, 0, narrow_place);
    int place = own_place;
    int64_t below = static_cast<int64_t>(8 * sizeof(T)) * p.hidden;
    T* to = dx + static_cast<int64_t>(tile.first) * p.hidden;
    hold(to);
    bool stores = p.dx != nullptr, drops = Lora && mask.drops();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      Words top{}, bottom{};
      if constexpr (!Lora) {
        if (p.add_input && stores) {
          top = load_words<Words>(dy + (place ^ 32 * c)), bottom = load_words<Words>(dy + (place ^ 32 * c) + kTile / 2);
        }
      }
      Words low{}, high{};
      if (stores) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Words w = weights.get(2 * c + k / 2);
          float sums[4] = {low_of<T>(top.at[k]), high_of<T>(top.at[k]), low_of<T>(bottom.at[k]),
                           high_of<T>(bottom.at[k])};
          multiply<T>(sums, a[0], a[1], a[2], a[3], w.at[k % 2 * 2], w.at[k % 2 * 2 + 1]);
          if (drops) {
#pragma unroll
            for (float& sum : sums) sum *= p.dropout.scale;
          }
          low.at[k] = word_of<T>(sums[0], sums[1]);
          high.at[k] = word_of<T>(sums[2], sums[3]);
        }
      }
      if (drops) drop(low, high, dy + kTile + (place ^ 32 * c), c);
      if (!stores) continue;
      if (fragment_row() < tile.count) store_piece_at(to + c * kFragmentCols, 0, piece_of(low));
      if (fragment_row() + 8 < tile.count) store_piece_at(to + c * kFragmentCols, below, piece_of(high));
    }
    if (drops) __syncwarp();
  }
  static ADAMIX_DEVICE uint4 piece_of(const Words& of) { return {of.at[0], of.at[1], of.at[2], of.at[3]}; }

  // Zero in the place of what is dropped of rows fragment_row() and 8 below, from column col0 + 32 c on, here and in x.
  ADAMIX_DEVICE void drop(Words& low, Words& high, T* x, int c) const {
    DropoutMask::EightColumns columns(col0 + c * kFragmentCols);
    auto both = [&](Words& of, T* in_x, int row) {
      TwoWords keys = memory.keys[row];
      uint4 all{~0u, ~0u, ~0u, ~0u}, kept = mask.kept(all, {keys.at[0], keys.at[1]}, columns);
      of = Words{{of.at[0] & kept.x, of.at[1] & kept.y, of.at[2] & kept.z, of.at[3] & kept.w}};
      if (!p.need_down) return;
      Words held = load_words<Words>(in_x);
      held = Words{{held.at[0] & kept.x, held.at[1] & kept.y, held.at[2] & kept.z, held.at[3] & kept.w}};
      *reinterpret_cast<Words*>(in_x) = held;
    };
    both(low, x, fragment_row());
    both(high, x + kTile / 2, fragment_row() + 8);
  }

  // The tile's part of both weight gradients, and of grad_out's columns' sums.
  ADAMIX_DEVICE void add(const T* dy) {
    uint32_t turned[4];
    if (p.need_up) {
      load_turned<1>(turned, memory.narrow + kNarrow, 0, 0, placed(own_turned, 0, narrow_place));
      TwoWords apart{};
      if constexpr (!Lora) apart = PassColumnSums::apart<T>();
      of_up.add(turned, dy, own, [&](int n, const uint32_t (&b)[4]) {
        if constexpr (!Lora) up_bias.template add<T>(n, b, apart);
      });
    }
    if (p.need_down) {
      load_turned<1>(turned, memory.narrow, 0, 0, placed(own_turned, 0, narrow_place));
      of_down.add(turned, dy + kTile, own, [](int, const uint32_t (&)[4]) {});
    }
  }

  // The block's sums of a side's bias: of the down side behind those of the up side.
  ADAMIX_DEVICE float* bias_sums(int side) const { return memory.sums + (side == 0 ? p.hidden : 0); }

  // They are there, complete after a barrier. All threads call.
  ADAMIX_DEVICE void join_down_bias() {
    __syncthreads();
    if (threadIdx.x < 128) {
      memory.bias[threadIdx.x * 2] = down_bias[0];
      memory.bias[threadIdx.x * 2 + 1] = down_bias[1];
    }
    down_bias[0] = down_bias[1] = 0.f;
    __syncthreads();
    if (threadIdx.x >= kFragmentRanks) return;
    float sum = 0.f;
    for (int i = 0; i < kFragmentRows; ++i) sum += memory.bias[i * kFragmentRanks + threadIdx.x];
    bias_sums(0)[threadIdx.x] = sum;
  }

  ADAMIX_DEVICE void join_up_bias() {
    __syncthreads();
    up_bias.each([&](int col, float sum) { bias_sums(1)[warp * kPassCols + col] = sum; });
    up_bias.clear();
  }
};

}  // namespace adamix
