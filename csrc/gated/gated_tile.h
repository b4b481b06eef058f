// A tile of rows times the experts that its slots name, for any sizes and dtypes.
//
// gather: rows times every named expert's narrow columns, each to the slots that name it. spread: what is narrow times
// the named experts' wide columns, summed over a row's slots in the experts' order. Where slots name experts of their
// own, a product is of one expert and only the rows that name it take it, so that no row sees another's infinities.
#pragma once

#include "common/routed_tile.h"
#include "gated/gated.h"

namespace adamix {

// Bit e of words[e / 32]: a row of the tile names expert e. No words: all are named.
struct NamedExperts {
  uint32_t* words;
  int count;

  template <typename Memory>
  ADAMIX_BOTH NamedExperts(Memory& memory, const SlotExperts& side)
      : words(nullptr), count(side.differ() ? ceil_div(side.experts, 32) : 0) {
    words = memory.template take<uint32_t>(max_of(count, 1));
  }
  ADAMIX_DEVICE bool any(int first, int last) const {
    bool found = count == 0;
    for (int expert = first; expert <= last && !found; ++expert) found = words[expert / 32] >> expert % 32 & 1;
    return found;
  }
};

// Columns of spread's left operand, of all experts, that are kept for all columns of its right one; 0: too many.
constexpr int kKeptRowBytes = 160;
template <typename T>
ADAMIX_BOTH int kept_cols(const SlotExperts& side, int ranks, bool biases) {
  int64_t cols = static_cast<int64_t>(side.experts) * (ranks + (biases ? 1 : 0));
  return cols * sizeof(T) > kKeptRowBytes ? 0 : round_up(static_cast<int>(cols), Piece<T>::kSize);
}

template <typename T>
struct GatedTile {
  static constexpr int kNarrow = kChunk<T>;
  Stages<T, kNarrow> stages;
  int64_t* in_offset;     // of the rows that are gathered
  int64_t* added_offset;  // of the rows added to what is spread
  int* served;            // whether a row's ids are all right
  NamedExperts down, up;
  float* sums;    // [warps, slots]
  int kept_cols;  // or 0
  T* kept;        // [kTileRows, kept_cols]
  int64_t first;
  int count;

  template <typename Memory>
  ADAMIX_BOTH GatedTile(Memory& memory, const Gates& gates, int cols_kept)
      : stages(memory),
        in_offset(memory.template take<int64_t>(kTileRows)),
        added_offset(memory.template take<int64_t>(kTileRows)),
        served(memory.template take<int>(kTileRows)),
        down(memory, gates.down),
        up(memory, gates.up),
        sums(memory.template take<float>(kTileThreads / 32 * max_of(gates.slots, 1))),
        kept_cols(cols_kept),
        kept(memory.template take<T>(kTileRows * cols_kept)),
        first(0),
        count(0) {}

  // The tile blockIdx.x of all `rows`. All threads call; complete on return.
  ADAMIX_DEVICE void find(int64_t rows, const Rows<const T>& in, const Rows<const T>& added, const Gates& gates) {
    first = static_cast<int64_t>(blockIdx.x) * kTileRows;
    count = rows - first < kTileRows ? static_cast<int>(rows - first) : kTileRows;
    for (int row = threadIdx.x; row < kTileRows; row += kTileThreads) {
      int number = static_cast<int>(first) + row;
      in_offset[row] = row < count ? in.offset(number) : 0;
      added_offset[row] = row < count && added.data != nullptr ? added.offset(number) : 0;
      served[row] = row < count && gates.served(gates.at(number));
    }
    __syncthreads();
    for (int word = threadIdx.x; word < down.count + up.count; word += kTileThreads) {
      bool is_up = word >= down.count;
      const SlotExperts& side = is_up ? gates.up : gates.down;
      int which = is_up ? word - down.count : word;
      uint32_t bits = 0;
      for (int row = 0; row < count; ++row) {
        int64_t at = gates.at(static_cast<int>(first) + row);
        for (int slot = 0; served[row] && slot < gates.slots; ++slot) {
          int expert = side.named(at + slot, slot);
          if (expert / 32 == which) bits |= 1u << expert % 32;
        }
      }
      (is_up ? up : down).words[which] = bits;
    }
    __syncthreads();
  }

  // NaN in columns [0, cols) of out's rows whose ids are wrong, pitch elements apart.
  template <typename Value>
  ADAMIX_DEVICE void poison(Value* out, int64_t pitch, int cols) const {
    for (int row = this_warp(); row < count; row += kTileThreads / 32) {
      if (served[row]) continue;
      for (int col = this_lane(); col < cols; col += 32)
        out[(first + row) * pitch + col] = from_float<Value>(not_a_number());
    }
  }
};

// Calls give(row, slot, expert, rank, sum) for every slot of the tile's rows and every rank of the expert it names.
template <typename T, Inner Right, typename LoadLeft, typename ChangeLeft, typename LoadRight, typename Give>
ADAMIX_DEVICE void gather(const GatedTile<T>& tile, const Gates& gates, const SlotExperts& side,
                          const NamedExperts& named, int inner, int ranks, const Divisor& by_ranks, LoadLeft load_left,
                          ChangeLeft change_left, LoadRight load_right, Give give) {
  constexpr int kNarrow = GatedTile<T>::kNarrow;
  int cols = side.experts * ranks;
  for (int col0 = 0; col0 < cols; col0 += kNarrow) {
    int last = col0 + kNarrow < cols ? col0 + kNarrow - 1 : cols - 1;
    if (!named.any(by_ranks.quotient(col0), by_ranks.quotient(last))) continue;
    narrow_product<T, kNarrow, Right>(tile.stages, inner, load_left, change_left,
                                      [&](T* right, int k0) { load_right(right, k0, col0); });
    visit_patch<float, kNarrow>(tile.stages.patch, [&](int row, int col, const float* sums) {
      if (row >= tile.count || !tile.served[row]) return;
      int64_t at = gates.at(static_cast<int>(tile.first) + row);
      // Neighbouring columns are of one expert, as a rule.
      int expert = by_ranks.quotient(col0 + col), rank = col0 + col - expert * ranks;
      if (side.differ() && col0 + col < cols && rank + Piece<float>::kSize <= ranks) {
#pragma unroll 1
        for (int slot = 0; slot < side.slots; ++slot) {
          if (side.named(at + slot, slot) != expert) continue;
#pragma unroll
          for (int e = 0; e < Piece<float>::kSize; ++e) give(row, slot, expert, rank + e, sums[e]);
        }
        return;
      }
#pragma unroll 1
      for (int e = 0; e < Piece<float>::kSize && col0 + col + e < cols; ++e) {
        expert = by_ranks.quotient(col0 + col + e), rank = col0 + col + e - expert * ranks;
        if (!side.differ()) {
          give(row, expert, expert, rank, sums[e]);
          continue;
        }
#pragma unroll 1
        for (int slot = 0; slot < side.slots; ++slot) {
          if (side.named(at + slot, slot) == expert) give(row, slot, expert, rank, sums[e]);
        }
      }
    });
  }
}

// Calls finish(row, col, valid, sums) for every piece of `cols` columns of the tile's rows, where sums are over a row's
// slots of narrow[row][slot][from + q] times column q of the slot's expert and, where there are bias_gates, of those
// times its bias: column `rank` of an expert. load_right(tile, col0, expert, experts, k0): kNarrow columns and kInner
// inner indices of so many experts, their ranks first and then their biases.
//
// Experts of a few ranks share a product's inner dimension, where what a row does not name is zero. Pieces that are not
// finite then are made again, expert by expert, by the rows that name it: no row sees another's infinities. Where
// tile.kept_cols says so, all experts do, and what is narrow is put in order once: here, or before where `filled`.
template <typename T, Inner Right, typename LoadRight, typename Finish>
ADAMIX_DEVICE void spread(const GatedTile<T>& tile, const Gates& gates, const SlotExperts& side,
                          const NamedExperts& named, const T* narrow, int pitch, int from, int rank,
                          const Divisor& by_rank, const T* bias_gates, bool filled, int cols, LoadRight load_right,
                          Finish finish) {
  constexpr int kNarrow = GatedTile<T>::kNarrow, kSize = Piece<T>::kSize, kPieces = kNarrow / kSize;
  constexpr int kMine = kWarpRows * kPieces / 32, kPitch = pitch_of<T>(kInner<T>), kLefts = kInner<T> / kSize;
  bool whole = rank % kSize == 0 && pitch % kSize == 0 && reinterpret_cast<uintptr_t>(narrow + from) % 16 == 0;
  int own_ranks = rank + (bias_gates == nullptr ? 0 : 1);
  int together = side.experts, kept = tile.kept_cols;
  if (side.differ() && kept == 0) together = max_of(1, kInner<T> / max_of(1, own_ranks));
  // Calls visit(slot) for the slots of a row that name an expert.
  auto each_slot = [&](int row, int expert, auto visit) {
    if (!side.differ()) return visit(expert);
    int64_t at = gates.at(static_cast<int>(tile.first) + row);
#pragma unroll 1
    for (int slot = 0; slot < side.slots; ++slot) {
      if (side.named(at + slot, slot) == expert) visit(slot);
    }
  };
  // to = kSize inner indices of a row from k on, of `count` experts from `expert` on.
  auto mix = [&](T* to, int row, int k, int expert, int count) {
    int weights = count * rank, inner = weights + (bias_gates == nullptr ? 0 : count);
    bool there = k < inner && row < tile.count && tile.served[row];
    int64_t slot0 = (tile.first + row) * side.slots;
    if (!there || (whole && k + kSize <= weights)) {
      float sums[kSize] = {};
      int of = there ? static_cast<int>(by_rank.quotient(k)) : 0;
      auto take = [&](int slot) {
        Piece<T> own = load_piece(narrow + (slot0 + slot) * pitch + from + k - of * rank, kSize, true);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[e] += to_float(own.values[e]);
      };
      if (there) each_slot(row, expert + of, take);
      Piece<T> piece;
#pragma unroll
      for (int e = 0; e < kSize; ++e) piece.values[e] = from_float<T>(sums[e]);
      store_piece(to, piece, kSize, true);
      return;
    }
#pragma unroll 1
    for (int e = 0; e < kSize; ++e) {
      float sum = 0.f;
      bool bias = k + e >= weights;
      int of = bias ? k + e - weights : static_cast<int>(by_rank.quotient(k + e));
      auto take = [&](int slot) {
        int64_t at = slot0 + slot;
        sum += to_float(bias ? bias_gates[at] : narrow[at * pitch + from + k + e - of * rank]);
      };
      if (k + e < inner) each_slot(row, expert + of, take);
      to[e] = from_float<T>(sum);
    }
  };
  for (int i = threadIdx.x; !filled && i < kTileRows * kept / kSize; i += kTileThreads) {
    int row = i / (kept / kSize), k = i % (kept / kSize) * kSize;
    mix(tile.kept + row * kept + k, row, k, 0, side.experts);
  }
  for (int col0 = 0; col0 < cols; col0 += kNarrow) {
    float totals[kMine][kSize] = {};
    bool again[kMine] = {};
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      int experts = pass == 0 ? together : 1;
      for (int expert = 0; expert < side.experts; expert += experts) {
        int count = side.experts - expert < experts ? side.experts - expert : experts;
        if (!named.any(expert, expert + count - 1)) continue;
        int inner = count * own_ranks;
        auto load_left = [&](T* left, int k0) {
          for (int i = threadIdx.x; i < kTileRows * kLefts; i += kTileThreads) {
            int row = i / kLefts, k = k0 + i % kLefts * kSize;
            T* to = left + row * kPitch + i % kLefts * kSize;
            if (pass > 0 || kept == 0) {
              mix(to, row, k, expert, count);
              continue;
            }
            Piece<T> piece{};
            if (k < kept) piece = load_piece(tile.kept + row * kept + k, kSize, true);
            store_piece(to, piece, kSize, true);
          }
        };
        narrow_product<T, kNarrow, Right>(
            tile.stages, inner, load_left, [](T*, int) {},
            [&](T* right, int k0) { load_right(right, col0, expert, count, k0); });
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          int piece = i * 32 + this_lane();
          int row = this_warp() * kWarpRows + piece / kPieces, col = piece % kPieces * kSize;
          bool takes = row < tile.count && (pass == 0 || again[i]);
          if (takes && side.differ() && experts == 1) {
            takes = false;
            if (tile.served[row]) each_slot(row, expert, [&](int) { takes = true; });
          }
          if (!takes) continue;
          const float* sums = tile.stages.patch + row * kPatchPitch + col;
#pragma unroll
          for (int e = 0; e < kSize; ++e) totals[i][e] += sums[e];
        }
      }
      if (pass > 0 || !side.differ() || together == 1) break;
      bool any = false;
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        float all = 0.f;
#pragma unroll
        for (int e = 0; e < kSize; ++e) all += totals[i][e] - totals[i][e];
        again[i] = !(all == 0.f), any = any || again[i];
#pragma unroll
        for (int e = 0; e < kSize; ++e) totals[i][e] = again[i] ? 0.f : totals[i][e];
      }
      if (__syncthreads_or(any) == 0) break;
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      int piece = i * 32 + this_lane();
      int row = this_warp() * kWarpRows + piece / kPieces, col = col0 + piece % kPieces * kSize;
      if (row >= tile.count || col >= cols) continue;
#pragma unroll
      for (int e = 0; e < kSize; ++e) totals[i][e] = tile.served[row] ? totals[i][e] : not_a_number();
      finish(row, col, cols - col, totals[i]);
    }
  }
}

}  // namespace adamix
