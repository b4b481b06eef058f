// A routed op's weight gradients where every sample has one expert a side, of ranks that one_pass.h does not hold, or
// of rows that are too wide for it. Each side is one product, of its wide operand and its narrow one.
//
// A block has kSampleCols columns of one side and a share of the tiles, which lie in the order of the side's experts:
// tiles of 64 rows of one sample. Four warps have 16 rows each of 64 columns, the other four of the next 64 columns.
// Their sums stay in registers until the expert changes; a second launch adds up what the shares leave.
#pragma once

#include "common/dropout.h"
#include "common/grad_side.h"
#include "common/launch.h"
#include "common/one_pass_sums.h"

namespace adamix {

constexpr int kSampleThreads = 256;
constexpr int kSampleCols = 2 * kPassCols;
constexpr int kSampleRows = 4 * kFragmentRows;  // of a tile
constexpr int kSampleStages = 3;
constexpr int kSamplesSorted = 1024;  // at most

template <typename T>
struct SampleGrads {
  GradSide<T> down, up;
  Dropout dropout;  // of down.wide
  float* planes;    // [shares, side, slots, planes_size]: an expert's [rank, cols], then its bias
  int* experts;     // [shares, side, slots]: whose sums a plane holds; kNoExpert: nobody's
  int64_t planes_size;
  int slots, samples, tokens, tiles_a_sample;
  int down_jobs;  // blocks of a share for the down side
};

template <typename T, int Steps>
struct SampleMemory {
  static constexpr int kWide = kFragmentRows * kPassCols, kNarrow = kFragmentRows * kFragmentRanks;
  static constexpr int kStage = kWide + Steps * kNarrow;
  static constexpr int kPitch = kSampleCols + 8;  // 8 ranks of 4 pairs of columns: no bank twice
  T* stages;                                      // [warps, kSampleStages, kStage]
  float* sums;                                    // [16 * Steps, kPitch]
  float* bias;                                    // [kSampleCols], or of ranks
  int* expert_of;                                 // [samples]
  int* order;                                     // [samples]: those that an expert serves
  int* served;                                    // how many

  template <typename Memory>
  ADAMIX_BOTH SampleMemory(Memory& memory, int samples)
      : stages(memory.template take<T>(kSampleThreads / 32 * kSampleStages * kStage)),
        sums(memory.template take<float>(16 * Steps * kPitch)),
        bias(memory.template take<float>(kSampleCols)),
        expert_of(memory.template take<int>(samples)),
        order(memory.template take<int>(samples)),
        served(memory.template take<int>(1)) {}
};

// Where a warp stands among the tiles: of the sample at `place` of the order, from row `token` on.
struct SampleCursor {
  int place, token;

  ADAMIX_DEVICE SampleCursor(int tile, int tiles_a_sample)
      : place(tile / tiles_a_sample), token(tile % tiles_a_sample * kSampleRows) {}
  ADAMIX_DEVICE void advance(int tokens) {
    token += kSampleRows;
    if (token >= tokens) token = 0, ++place;
  }
};

template <typename T, int Steps>
struct SampleBlock {
  using Memory = SampleMemory<T, Steps>;
  const SampleGrads<T>& p;
  const Memory& memory;
  GradSide<T> side;
  bool up;
  int job, warp, lane, row0, col0;  // row0: of the warp, in a tile; col0: of the warp, in the block
  int own, own_narrow;              // see load_turned
  T* stages;                        // the warp's
  DropoutMask mask;
  PassSums sums[Steps];
  PassColumnSums bias;
  float rank_bias[Steps][4];  // of ranks fragment_row() (values 0, 1) and 8 behind (2, 3)

  ADAMIX_DEVICE SampleBlock(const SampleGrads<T>& params, const Memory& shared)
      : p(params),
        memory(shared),
        side(static_cast<int>(blockIdx.x) < params.down_jobs ? params.down : params.up),
        up(static_cast<int>(blockIdx.x) >= params.down_jobs),
        job(static_cast<int>(blockIdx.x) - (up ? params.down_jobs : 0)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        row0(warp % 4 * kFragmentRows),
        col0(warp / 4 * kPassCols),
        own(pass_place(tile_row<0>(), tile_piece<0>())),
        own_narrow(narrow_place(tile_row<1>(), tile_piece<1>())),
        stages(shared.stages + warp * kSampleStages * Memory::kStage),
        mask(up ? Dropout{} : params.dropout) {
    hold(own), hold(own_narrow);
    clear();
  }

  ADAMIX_DEVICE void clear() {
    bias.clear();
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      sums[s].clear();
#pragma unroll
      for (float& value : rank_bias[s]) value = 0.f;
    }
  }

  // memory.order: the samples that an expert serves, by their expert, then by their number. All threads call; complete
  // on return.
  ADAMIX_DEVICE void sort() const {
    for (int sample = threadIdx.x; sample < p.samples; sample += kSampleThreads) {
      int expert = side.routing.expert(sample * p.tokens);
      memory.expert_of[sample] = side.other.expert(sample * p.tokens) == kNoExpert ? kNoExpert : expert;
    }
    __syncthreads();
    if (warp == 0) {
      int count = 0;
      for (int expert = next(-1); expert != kNoExpert; expert = next(expert)) {
        for (int from = 0; from < p.samples; from += 32) {
          bool mine = from + lane < p.samples && memory.expert_of[from + lane] == expert;
          uint32_t all = __ballot_sync(0xffffffffu, mine);
          if (mine) memory.order[count + __popc(all & ((1u << lane) - 1))] = from + lane;
          count += __popc(all);
        }
      }
      if (lane == 0) *memory.served = count;
    }
    __syncthreads();
  }
  // The smallest expert above `previous` that serves a sample, or kNoExpert. All lanes of a warp call.
  ADAMIX_DEVICE int next(int previous) const {
    int found = kNoExpert;
    for (int sample = lane; sample < p.samples; sample += 32) {
      int expert = memory.expert_of[sample];
      if (expert > previous && expert < found) found = expert;
    }
    return warp_reduce(found, Min{});
  }

  // Starts the copies of the warp's rows and columns of a tile, and of the narrow rows; zeros behind the last.
  ADAMIX_DEVICE void load(T* stage, const SampleCursor& at) const {
    int sample = memory.order[at.place], first = at.token + row0, count = p.tokens - first;
    const T* wide = side.wide.data + sample * side.wide.batch_stride + (first + lane / 8) * side.wide.token_stride +
                    (job * kSampleCols + col0 + lane % 8 * 8);
    int place = pass_place(lane / 8, lane % 8);
    int64_t step = 4 * side.wide.token_stride;
#pragma unroll
    for (int i = 0; i < kFragmentRows / 4; ++i) {
      // As pass_place(lane / 8 + 4 i, lane % 8).
      copy_async_or_zero(stage + (place ^ i % 2 * 16) + 4 * i * kPassCols, wide, lane / 8 + 4 * i < count);
      wide += step;
    }
    int rank = lane % 2 * 8;
    const T* narrow = side.narrow + (static_cast<int64_t>(sample) * p.tokens + first + lane / 2) * side.ranks + rank;
    T* to = stage + Memory::kWide + narrow_place(lane / 2, lane % 2);
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      copy_async_or_zero(to + s * Memory::kNarrow, narrow + s * kFragmentRanks,
                         lane / 2 < count && rank + s * kFragmentRanks < side.ranks);
    }
  }

  // Zero in the place of what is dropped of the warp's rows of x; complete for the warp on return.
  ADAMIX_DEVICE void drop(T* stage, const SampleCursor& at) const {
    int64_t row = static_cast<int64_t>(memory.order[at.place]) * p.tokens + at.token + row0;
    DropoutMask::RowKeys all = mask.of_row(row + lane % 16);
    T* place = stage + pass_place(fragment_row(), fragment_part());
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      DropoutMask::EightColumns columns(job * kSampleCols + col0 + c * kFragmentCols + fragment_part() * 8);
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        int of = fragment_row() + 8 * below;
        DropoutMask::RowKeys keys{shuffle_from(all.factor, of), shuffle_from(all.offset, of)};
        uint4* piece = reinterpret_cast<uint4*>(stage + ((place - stage) ^ 32 * c) + below * Memory::kWide / 2);
        *piece = mask.kept(*piece, keys, columns);
      }
    }
    __syncwarp();
  }

  // The warp's part of the products.
  ADAMIX_DEVICE void add(const T* stage) {
    constexpr uint32_t kOnes = PassColumnSums::ones<T>();
    uint32_t a[Steps][4];
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      load_turned<1>(a[s], stage + Memory::kWide + s * Memory::kNarrow, 0, 0, placed(own_narrow, 0, narrow_place));
    }
    if (side.bias_of == BiasOf::kNarrow && job == 0 && col0 == 0) {
#pragma unroll
      for (int s = 0; s < Steps; ++s) multiply<T>(rank_bias[s], a[s][0], a[s][1], a[s][2], a[s][3], kOnes, kOnes);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b[4];
      load_turned<0>(b, stage, 0, 16 * n, placed(own, 2 * n, pass_place));
#pragma unroll
      for (int s = 0; s < Steps; ++s) {
        multiply<T>(sums[s].at[2 * n], a[s][0], a[s][1], a[s][2], a[s][3], b[0], b[1]);
        multiply<T>(sums[s].at[2 * n + 1], a[s][0], a[s][1], a[s][2], a[s][3], b[2], b[3]);
      }
      if (side.bias_of == BiasOf::kWide) bias.template add<T>(n, b);
    }
  }

  // The block's sums, of the warps in the order of their rows, to plane `slot` of the share. All threads call.
  ADAMIX_DEVICE void flush(int slot) {
    __syncthreads();  // what an earlier one left is written
    for (int rows = 0; rows < kSampleRows; rows += kFragmentRows) {
      if (rows == row0) leave(rows == 0);
      __syncthreads();
    }
    clear();
    int64_t plane = (static_cast<int64_t>(blockIdx.y) * 2 + up) * p.slots + slot;
    float* to = p.planes + plane * p.planes_size + job * kSampleCols;
    for (int i = threadIdx.x; i < side.ranks * (kSampleCols / 4); i += kSampleThreads) {
      int rank = i / (kSampleCols / 4), col = i % (kSampleCols / 4) * 4;
      *reinterpret_cast<Piece<float>*>(to + static_cast<int64_t>(rank) * side.cols + col) =
          *reinterpret_cast<const Piece<float>*>(memory.sums + rank * Memory::kPitch + col);
    }
    float* biases = p.planes + plane * p.planes_size + static_cast<int64_t>(side.ranks) * side.cols;
    int col = threadIdx.x;
    if (side.bias_of == BiasOf::kWide && col < kSampleCols) biases[job * kSampleCols + col] = memory.bias[col];
    if (side.bias_of == BiasOf::kNarrow && job == 0 && col < side.ranks) biases[col] = memory.bias[col];
  }

  // memory.sums and memory.bias of the warp's columns = its sums, or += them.
  ADAMIX_DEVICE void leave(bool fresh) const {
    auto put = [&](float* to, float low, float high) {
      PassPair sum{low, high};
      if (!fresh) {
        PassPair held = load_words<PassPair>(to);
        sum = {sum.low + held.low, sum.high + held.high};
      }
      store_words(to, sum);
    };
    float* to = memory.sums + fragment_row() * Memory::kPitch + col0 + fragment_part() * 2;
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float (&of)[4] = sums[s].at[n];
        put(to + 16 * s * Memory::kPitch + 8 * n, of[0], of[1]);
        put(to + (16 * s + 8) * Memory::kPitch + 8 * n, of[2], of[3]);
      }
    }
    if (fragment_part() != 0) return;
    auto put_one = [&](float* at, float value) { *at = fresh ? value : *at + value; };
    if (side.bias_of == BiasOf::kWide) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        put_one(memory.bias + col0 + 16 * n + fragment_row(), bias.at[n][0]);
        put_one(memory.bias + col0 + 16 * n + 8 + fragment_row(), bias.at[n][2]);
      }
    } else if (col0 == 0) {
#pragma unroll
      for (int s = 0; s < Steps; ++s) {
        put_one(memory.bias + 16 * s + fragment_row(), rank_bias[s][0]);
        put_one(memory.bias + 16 * s + 8 + fragment_row(), rank_bias[s][2]);
      }
    }
  }

  ADAMIX_DEVICE void walk() {
    sort();
    int all = *memory.served * p.tiles_a_sample, a_share = ceil_div(all, static_cast<int>(gridDim.y));
    int begin = static_cast<int>(blockIdx.y) * a_share, end = all - begin < a_share ? all : begin + a_share;
    SampleCursor at(begin, p.tiles_a_sample), ahead = at;
    T *stage = stages, *free = stages;
    auto after = [&](T* of) {
      return of == stages + (kSampleStages - 1) * Memory::kStage ? stages : of + Memory::kStage;
    };
    auto load_next = [&](bool there) {
      if (there) {
        load(free, ahead);
        ahead.advance(p.tokens);
        free = after(free);
      }
      copy_commit();
    };
    for (int i = 0; i < kSampleStages - 1; ++i) load_next(begin + i < end);
    int* experts = p.experts + (static_cast<int64_t>(blockIdx.y) * 2 + up) * p.slots;
    int now = kNoExpert, slot = 0;
    auto leave_slot = [&] {
      flush(slot);
      if (job == 0 && threadIdx.x == 0) experts[slot] = now;
      ++slot;
    };
    for (int tile = begin; tile < end; ++tile) {
      __syncwarp();
      load_next(tile + kSampleStages - 1 < end);
      if (at.token == 0 || tile == begin) {
        int expert = memory.expert_of[memory.order[at.place]];
        if (expert != now && now != kNoExpert) leave_slot();
        now = expert;
      }
      copy_wait<kSampleStages - 1>();
      __syncwarp();
      if (mask.drops()) drop(stage, at);
      add(stage);
      stage = after(stage);
      at.advance(p.tokens);
    }
    if (now != kNoExpert) leave_slot();
    if (job == 0) {
      for (int i = slot + threadIdx.x; i < p.slots; i += kSampleThreads) experts[i] = kNoExpert;
    }
  }
};

}  // namespace adamix
