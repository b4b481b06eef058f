// A block of sample_grads.h: the samples' order, copies of tiles, the products, and where its sums go.
#pragma once

#include "common/one_pass_sums.h"
#include "common/sample_grads.h"

namespace adamix {

// Where a block stands among the tiles: of the sample at `place` of the order, from row `token` on.
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
  bool up;
  const T *wide, *narrow;
  int64_t batch_stride, token_stride;  // of wide
  BiasOf bias_of;
  int job, warp, lane, row0, col0;   // row0: of the warp, in a tile; col0: of the warp, in the block
  int half;                          // of the block's columns: which the warp has
  int col;                           // of the lane, in the tensor
  int row, narrow_row;               // of the lane's copies, in a tile
  int ranks_left;                    // from the lane's first copy on
  int own_place, own_ranks;          // of the lane's pieces of a wide tile, and of ranks
  int own, own_turned;               // see load_turned
  const T *next_wide, *next_narrow;  // where the lane's copies of the next tile begin
  TwoWords apart;                    // see PassColumnSums
  DropoutMask mask;
  PassSums sums[Steps];
  PassColumnSums bias;
  float rank_bias[Steps][4];  // of ranks fragment_row() (values 0, 1) and 8 behind (2, 3)

  ADAMIX_DEVICE SampleBlock(const SampleGrads<T>& params, const Memory& shared)
      : p(params),
        memory(shared),
        up(static_cast<int>(blockIdx.x) >= params.down_jobs),
        wide(up ? params.up.wide.data : params.down.wide.data),
        narrow(up ? params.up.narrow : params.down.narrow),
        batch_stride(up ? params.up.wide.batch_stride : params.down.wide.batch_stride),
        token_stride(up ? params.up.wide.token_stride : params.down.wide.token_stride),
        bias_of(up ? params.up.bias_of : params.down.bias_of),
        job(static_cast<int>(blockIdx.x) - (up ? params.down_jobs : 0)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        row0(warp % 4 * kFragmentRows),
        col0(warp / 4 * kPassCols),
        half(warp / 4),
        col(job * kSampleCols + col0 + fragment_part() * 8),
        row(row0 + fragment_row()),
        narrow_row(row0 + lane / 2),
        ranks_left(params.ranks - half * kFragmentRanks - lane % 2 * 8),
        own_place(warp % 4 * Memory::kGroup + half * Memory::kWide + pass_place(fragment_row(), fragment_part())),
        own_ranks(warp % 4 * Memory::kGroup + 2 * Memory::kWide + half * Memory::kNarrow +
                  narrow_place(lane / 2, lane % 2)),
        own(pass_place(tile_row<0>(), tile_piece<0>())),
        own_turned(narrow_place(tile_row<1>(), tile_piece<1>())),
        next_wide(nullptr),
        next_narrow(nullptr),
        apart(PassColumnSums::apart<T>()),
        mask(up ? Dropout{} : params.dropout) {
    hold(row), hold(narrow_row), hold(ranks_left), hold(own_place), hold(own_ranks), hold(own), hold(own_turned);
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
      int row = sample * p.tokens;
      int expert = up ? p.up.routing.expert(row) : p.down.routing.expert(row);
      int other = up ? p.up.other.expert(row) : p.down.other.expert(row);
      memory.expert_of[sample] = other == kNoExpert ? kNoExpert : expert;
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

  // Starts the copies of the warp's rows and columns of a tile, and of every other 16 ranks; zeros behind the last row.
  // stage: where it begins in memory.stages. begins: the copies before were not those of the tile before.
  ADAMIX_DEVICE void load(int stage, const SampleCursor& at, bool begins) {
    if (begins || at.token == 0) {
      int sample = memory.order[at.place];
      next_wide = wide + sample * batch_stride + (at.token + row) * token_stride + col;
      next_narrow = narrow + (static_cast<int64_t>(sample) * p.tokens + at.token + narrow_row) * p.ranks +
                    (half * kFragmentRanks + lane % 2 * 8);
    }
    int left = p.tokens - at.token;
    T* to = memory.stages + stage;
    pass_copy(to, own_place, next_wide, next_wide + 8 * token_stride, left - row);
    bool there = narrow_row < left;
#pragma unroll
    for (int i = 0; i < (Steps + 1) / 2; ++i) {
      if (2 * i + 1 == Steps && half == 1) break;
      copy_async_or_zero(to + own_ranks + 2 * i * Memory::kNarrow, next_narrow + 2 * i * kFragmentRanks,
                         there && ranks_left > 2 * i * kFragmentRanks);
    }
    next_wide += kSampleRows * token_stride;
    next_narrow += kSampleRows * p.ranks;
  }

  // Zero in the place of what is dropped of the warp's rows of x; complete for the warp on return.
  ADAMIX_DEVICE void drop(int stage, const SampleCursor& at) const {
    int64_t row = static_cast<int64_t>(memory.order[at.place]) * p.tokens + at.token + row0;
    DropoutMask::RowKeys all = mask.of_row(row + lane % 16);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      DropoutMask::EightColumns columns(col + c * kFragmentCols);
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        int of = fragment_row() + 8 * below;
        DropoutMask::RowKeys keys{shuffle_from(all.factor, of), shuffle_from(all.offset, of)};
        uint4* piece =
            reinterpret_cast<uint4*>(memory.stages + stage + (own_place ^ 32 * c) + below * Memory::kWide / 2);
        *piece = mask.kept(*piece, keys, columns);
      }
    }
    __syncwarp();
  }

  // The warp's part of the products.
  ADAMIX_DEVICE void add(int stage) {
    constexpr uint32_t kOnes = PassColumnSums::ones<T>();
    const T* group = memory.stages + stage + warp % 4 * Memory::kGroup;
    const T *rows = group + half * Memory::kWide, *narrow_rows = group + 2 * Memory::kWide;
    uint32_t a[Steps][4];
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      load_turned<1>(a[s], narrow_rows + s * Memory::kNarrow, 0, 0, placed(own_turned, 0, narrow_place));
    }
    if (bias_of == BiasOf::kNarrow && job == 0 && col0 == 0) {
#pragma unroll
      for (int s = 0; s < Steps; ++s) multiply<T>(rank_bias[s], a[s][0], a[s][1], a[s][2], a[s][3], kOnes, kOnes);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b[4];
      load_turned<0>(b, rows, 0, 16 * n, placed(own, 2 * n, pass_place));
#pragma unroll
      for (int s = 0; s < Steps; ++s) {
        multiply<T>(sums[s].at[2 * n], a[s][0], a[s][1], a[s][2], a[s][3], b[0], b[1]);
        multiply<T>(sums[s].at[2 * n + 1], a[s][0], a[s][1], a[s][2], a[s][3], b[2], b[3]);
      }
      if (bias_of == BiasOf::kWide) bias.template add<T>(n, b, apart);
    }
  }

  // The first of the side's planes in the share.
  ADAMIX_DEVICE int plane0() const { return static_cast<int>(blockIdx.y) * 2 * p.slots + (up ? p.slots : 0); }

  // The block's sums, of the warps in the order of their rows, to plane `slot` of the share. All threads call.
  ADAMIX_DEVICE void flush(int slot) {
    __syncthreads();  // what an earlier one left is written
    for (int rows = 0; rows < kSampleRows; rows += kFragmentRows) {
      if (rows == row0) leave(rows == 0);
      __syncthreads();
    }
    clear();
    int64_t plane = plane0() + slot;
    float* to = p.planes + plane * p.planes_size + job * kSampleCols;
    for (int i = threadIdx.x; i < p.ranks * (kSampleCols / 4); i += kSampleThreads) {
      int rank = i / (kSampleCols / 4), col = i % (kSampleCols / 4) * 4;
      *reinterpret_cast<Piece<float>*>(to + static_cast<int64_t>(rank) * p.cols + col) =
          *reinterpret_cast<const Piece<float>*>(memory.sums + rank * Memory::kPitch + col);
    }
    float* biases = p.planes + plane * p.planes_size + static_cast<int64_t>(p.ranks) * p.cols;
    int col = threadIdx.x;
    if (bias_of == BiasOf::kWide && col < kSampleCols) biases[job * kSampleCols + col] = memory.bias[col];
    if (bias_of == BiasOf::kNarrow && job == 0 && col < p.ranks) biases[col] = memory.bias[col];
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
    auto put_one = [&](int at, float value) { memory.bias[at] = fresh ? value : memory.bias[at] + value; };
    if (bias_of == BiasOf::kWide) bias.each([&](int of, float sum) { put_one(col0 + of, sum); });
    if (bias_of != BiasOf::kNarrow || col0 != 0 || fragment_part() != 0) return;
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      put_one(16 * s + fragment_row(), rank_bias[s][0]);
      put_one(16 * s + 8 + fragment_row(), rank_bias[s][2]);
    }
  }

  ADAMIX_DEVICE void walk() {
    sort();
    int all = *memory.served * p.tiles_a_sample, a_share = ceil_div(all, static_cast<int>(gridDim.y));
    int begin = static_cast<int>(blockIdx.y) * a_share, end = all - begin < a_share ? all : begin + a_share;
    SampleCursor at(begin, p.tiles_a_sample), ahead = at;
    int stage = 0, free = 0;  // the tile's, and that of the one before
    auto after = [](int of) { return of == (kSampleStages - 1) * Memory::kStage ? 0 : of + Memory::kStage; };
    auto load_ahead = [&](int to, int tile) {
      if (tile < end) {
        load(to, ahead, tile == begin);
        ahead.advance(p.tokens);
      }
      copy_commit();
    };
    for (int i = 0; i < kSampleStages - 1; ++i, free = after(free)) load_ahead(free, begin + i);
    int* experts = p.experts + plane0();
    int now = kNoExpert, slot = 0;
    auto leave_slot = [&] {
      flush(slot);
      if (job == 0 && threadIdx.x == 0) experts[slot] = now;
      ++slot;
    };
    for (int tile = begin; tile < end; ++tile) {
      copy_wait<kSampleStages - 2>();
      __syncthreads();  // the tile is there, and nobody reads the one before
      load_ahead(free, tile + kSampleStages - 1);
      if (at.token == 0 || tile == begin) {
        int expert = memory.expert_of[memory.order[at.place]];
        if (expert != now && now != kNoExpert) leave_slot();
        now = expert;
      }
      if (mask.drops()) drop(stage, at);
      add(stage);
      free = stage, stage = after(stage);
      at.advance(p.tokens);
    }
    if (now != kNoExpert) leave_slot();
    if (job == 0) {
      for (int i = slot + threadIdx.x; i < p.slots; i += kSampleThreads) experts[i] = kNoExpert;
    }
  }
};

}  // namespace adamix
