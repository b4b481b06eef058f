// A block of one_pass.h: copies of a tile, its products, its part of the weight gradients.
#pragma once

#include "common/activation.h"
#include "routed_adapter/one_pass_sums.h"

namespace adamix {

// Rows [first, first + count) of one sample, rows token on of it.
struct PassTile {
  int sample, token, first, count;
};

template <typename T, bool Keeps>
struct PassBlock {
  static constexpr int kTile = PassMemory<T>::kTile;
  const RoutedAdapterOnePass<T>& p;
  const PassMemory<T>& memory;
  T* stages;  // the warp's
  int warp, lane, warps, col0;
  PassSums of_down, of_up;
  float up_bias[2][8];   // of the lane's columns
  float down_bias[2];    // of the lane's two ranks, in the first 128 threads
  int down_now, up_now;  // whose sums are held

  ADAMIX_DEVICE PassBlock(const RoutedAdapterOnePass<T>& params, const PassMemory<T>& shared)
      : p(params),
        memory(shared),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        warps(blockDim.x / 32),
        up_bias{},
        down_bias{0.f, 0.f},
        down_now(kNoExpert),
        up_now(kNoExpert) {
    stages = memory.stages + warp * 4 * kTile;
    col0 = warp * kPassCols + fragment_part() * 8;
    of_down.clear(), of_up.clear();
  }

  ADAMIX_DEVICE PassTile place(int tile) const {
    PassTile found;
    found.sample = static_cast<int>(p.tiles_a_sample.quotient(tile));
    found.token = (tile - found.sample * static_cast<int>(p.tiles_a_sample.by)) * kFragmentRows;
    found.first = found.sample * p.tokens + found.token;
    found.count = p.tokens - found.token < kFragmentRows ? p.tokens - found.token : kFragmentRows;
    return found;
  }

  ADAMIX_DEVICE T* stage(int tile) const { return stages + tile % 2 * 2 * kTile; }

  // Starts the copies of a tile: the warp's columns, rows of zeros behind the last.
  ADAMIX_DEVICE void load(int tile) const {
    PassTile at = place(tile);
    copy(stage(tile), p.grad_out, at);
    if (p.need_down) copy(stage(tile) + kTile, p.x, at);
  }

  ADAMIX_DEVICE void copy(T* to, const Rows<const T>& from, const PassTile& at) const {
    int row = lane / 8, place = lane % 8 ^ (row % 2 << 2 | row / 2);
    const T* base = from.data + at.sample * from.batch_stride + (at.token + row) * from.token_stride +
                    (warp * kPassCols + lane % 8 * 8);
    int64_t step = 4 * from.token_stride;
#pragma unroll
    for (int i = 0; i < kFragmentRows / 4; ++i) {
      // As pass_place(row + 4 i, lane % 8).
      copy_async_or_zero(to + (row + 4 * i) * kPassCols + (place ^ i % 2 * 2) * 8, base, row + 4 * i < at.count);
      base += step;
    }
  }

  // The lane's words of a row of the tile, columns c * 32 on.
  static ADAMIX_DEVICE Words words_of(const T* tile, int row, int c) {
    return *reinterpret_cast<const Words*>(tile + pass_place(row, c * 4 + fragment_part()));
  }

  ADAMIX_DEVICE void poison(const PassTile& at) const {
    if (p.dx == nullptr) return;
    for (int row = warp; row < at.count; row += warps) {
      for (int col = lane; col < p.hidden; col += 32) {
        p.dx[static_cast<int64_t>(at.first + row) * p.hidden + col] = from_float<T>(not_a_number());
      }
    }
  }

  // memory.dpre and memory.h of the tile, from the warps' parts of grad_out Wu; complete on return.
  ADAMIX_DEVICE void narrow(const T* dy, const PassTile& at, const PassWeights<T, Keeps, true>& weights,
                            const ResidentBank<T>& bank) {
    // Two ranks of a row for each of the first 128 threads.
    int own_row = threadIdx.x / 8, own_rank = static_cast<int>(threadIdx.x) % 8 * 2;
    bool own = threadIdx.x < 128 && own_row < at.count && own_rank < p.rank;
    uint32_t pre = 0;
    if (own) {
      pre = *reinterpret_cast<const uint32_t*>(p.pre + static_cast<int64_t>(at.first + own_row) * p.rank + own_rank);
    }
    float sums[2][4] = {};
    copy_wait<1>();
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      uint32_t w[4][2];
      weights.get(w, bank, c, col0);
      Words top = words_of(dy, fragment_row(), c), bottom = words_of(dy, fragment_row() + 8, c);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        multiply_rows<T>(sums[u], top, bottom, w[0][u], w[1][u], w[2][u], w[3][u]);
      }
    }
    float* to = memory.sums + (warp * kFragmentRows + fragment_row()) * kFragmentRanks + fragment_part() * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Piece<float> piece{{sums[0][2 * half], sums[0][2 * half + 1], sums[1][2 * half], sums[1][2 * half + 1]}};
      *reinterpret_cast<Piece<float>*>(to + half * 8 * kFragmentRanks) = piece;
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      const float* from = memory.sums + threadIdx.x * 2;
      float low = from[0], high = from[1];
#pragma unroll 4
      for (int other = 1; other < warps; ++other) {
        from += kFragmentRows * kFragmentRanks;
        low += from[0], high += from[1];
      }
      uint32_t dpre = 0, h = 0;  // rows and ranks that are not there: whatever the sums
      if (own) {
        float pre_low = low_of<T>(pre), pre_high = high_of<T>(pre);
        dpre =
            word_of<T>(low * activation_slope(p.activation, pre_low), high * activation_slope(p.activation, pre_high));
        h = word_of<T>(activate(p.activation, pre_low), activate(p.activation, pre_high));
        down_bias[0] += low_of<T>(dpre), down_bias[1] += high_of<T>(dpre);
      }
      memory.dpre[threadIdx.x] = dpre;
      memory.h[threadIdx.x] = h;
    }
    __syncthreads();
  }

  // The tile's part of the sums of grad_out's columns.
  ADAMIX_DEVICE void add_up_bias(const Words& top, const Words& bottom, int c) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      up_bias[c][2 * k] += low_of<T>(top.at[k]) + low_of<T>(bottom.at[k]);
      up_bias[c][2 * k + 1] += high_of<T>(top.at[k]) + high_of<T>(bottom.at[k]);
    }
  }

  // dx = dpre Wd (+ grad_out) of the tile, and its part of the bias' sums.
  ADAMIX_DEVICE void wide(const T* dy, const PassTile& at, const PassWeights<T, Keeps, false>& weights,
                          const ResidentBank<T>& bank) {
    const uint32_t* from = memory.dpre + fragment_row() * 8 + fragment_part() * 2;
    TwoWords a = *reinterpret_cast<const TwoWords*>(from), b = *reinterpret_cast<const TwoWords*>(from + 64);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      Words top = words_of(dy, fragment_row(), c), bottom = words_of(dy, fragment_row() + 8, c);
      if (p.need_up) add_up_bias(top, bottom, c);
      if (p.dx == nullptr) continue;
      uint32_t w[4][2];
      weights.get(w, bank, c, col0);
      if (!p.add_input) top = bottom = Words{};
      Words low, high;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float sums[4] = {low_of<T>(top.at[k]), high_of<T>(top.at[k]), low_of<T>(bottom.at[k]),
                         high_of<T>(bottom.at[k])};
        multiply<T>(sums, a.at[0], b.at[0], a.at[1], b.at[1], w[k][0], w[k][1]);
        low.at[k] = word_of<T>(sums[0], sums[1]);
        high.at[k] = word_of<T>(sums[2], sums[3]);
      }
      T* to = p.dx + static_cast<int64_t>(at.first + fragment_row()) * p.hidden + col0 + c * kFragmentCols;
      if (fragment_row() < at.count) store_words(to, low);
      if (fragment_row() + 8 < at.count) store_words(to + static_cast<int64_t>(8) * p.hidden, high);
    }
  }

  // The tile's part of both weight gradients.
  ADAMIX_DEVICE void add(const T* dy) {
    auto place = [](int row, int piece) { return row * kFragmentRanks + piece * 8; };
    uint32_t turned[4];
    if (p.need_up) {
      load_turned<1>(turned, reinterpret_cast<const T*>(memory.h), 0, 0, place);
      of_up.add(turned, dy);
    }
    if (p.need_down) {
      load_turned<1>(turned, reinterpret_cast<const T*>(memory.dpre), 0, 0, place);
      of_down.add(turned, dy + kTile);
    }
  }

  // The block's sums of the biases in memory.sums; complete after a barrier. All threads call.
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
    memory.sums[threadIdx.x] = sum;
  }

  ADAMIX_DEVICE void join_up_bias() {
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float sum = up_bias[c][e];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) sum += shuffle_xor(sum, distance);
        if (fragment_row() == 0) memory.sums[col0 + c * kFragmentCols + e] = sum;
        up_bias[c][e] = 0.f;
      }
    }
  }
};

}  // namespace adamix
