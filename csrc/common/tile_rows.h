// The rows of a block's tile: where they lie, and which experts serve them.
#pragma once

#include "common/routed_tile.h"
#include "common/warp.h"

namespace adamix {

struct TileRows {
  int64_t* in_offset;     // of the rows the narrow product multiplies
  int64_t* added_offset;  // of the rows added to the wide product
  int* narrow_expert;     // kNoExpert behind the last row, and for a row that one of its ids puts into no bank
  int* wide_expert;       // the same
  int64_t first;
  int count;
  bool all_served;  // by an expert on both sides

  template <typename Memory>
  ADAMIX_BOTH explicit TileRows(Memory& memory) {
    in_offset = memory.template take<int64_t>(kTileRows);
    added_offset = memory.template take<int64_t>(kTileRows);
    narrow_expert = memory.template take<int>(kTileRows);
    wide_expert = memory.template take<int>(kTileRows);
  }

  // The tile blockIdx.x of all `rows`, fewer than 2^31. All threads call; complete on return.
  template <typename T>
  ADAMIX_DEVICE void find(int64_t rows, const Rows<const T>& in, const Rows<const T>& added, const Routing& narrow,
                          const Routing& wide) {
    first = static_cast<int64_t>(blockIdx.x) * kTileRows;
    count = rows - first < kTileRows ? static_cast<int>(rows - first) : kTileRows;
    bool lost = false;
    for (int row = threadIdx.x; row < kTileRows; row += kTileThreads) {
      bool inside = row < count;
      int number = static_cast<int>(first) + row;
      in_offset[row] = inside ? in.offset(number) : 0;
      added_offset[row] = inside && added.data != nullptr ? added.offset(number) : 0;
      int narrow_one = inside ? narrow.expert(number) : kNoExpert, wide_one = inside ? wide.expert(number) : kNoExpert;
      bool served = narrow_one != kNoExpert && wide_one != kNoExpert;
      narrow_expert[row] = served ? narrow_one : kNoExpert;
      wide_expert[row] = served ? wide_one : kNoExpert;
      lost = lost || (inside && !served);
    }
    all_served = __syncthreads_or(lost) == 0;
  }

  // NaN in columns [0, cols) of out's rows that no expert serves, pitch elements apart. All threads call.
  template <typename T>
  ADAMIX_DEVICE void poison(T* out, int64_t pitch, int cols) const {
    if (all_served) return;
    for (int row = this_warp(); row < count; row += kTileThreads / 32) {
      if (narrow_expert[row] != kNoExpert) continue;
      for (int col = this_lane(); col < cols; col += 32)
        out[(first + row) * pitch + col] = from_float<T>(not_a_number());
    }
  }
};

// The smallest expert above `previous` of a tile's rows, or kNoExpert; start with -1. All lanes call.
ADAMIX_DEVICE int next_expert(const int* experts, int previous) {
  int next = kNoExpert;
#pragma unroll
  for (int row = 0; row < kTileRows; row += 32) {
    int expert = experts[row + this_lane()];
    if (expert > previous && expert < next) next = expert;
  }
  return warp_reduce(next, Min{});
}

// Calls body(expert) for every expert of a tile's rows, in ascending order.
template <typename Body>
ADAMIX_DEVICE void for_each_expert(const int* experts, Body body) {
  for (int expert = next_expert(experts, -1); expert != kNoExpert; expert = next_expert(experts, expert)) body(expert);
}

// The left operand of a narrow product: kInner columns of the tile's rows from column k0 on, zero from `cols` on.
template <typename T>
ADAMIX_DEVICE void load_rows(T* tile, const TileRows& rows, const T* data, int k0, int cols, bool aligned) {
  load_tile<kTileRows, kInner<T>, kTileThreads>(
      tile, data + k0, [&](int row) { return rows.in_offset[row]; }, [&](int row) { return row < rows.count; },
      cols - k0, aligned);
}

// The left operand of a wide product: [kTileRows, columns up to a multiple of 16], zero until it is written.
template <typename T>
struct NarrowTile {
  T* data;
  int pitch;

  template <typename Memory>
  ADAMIX_BOTH NarrowTile(Memory& memory, int cols) : pitch(pitch_of<T>(round_up(cols, 16))) {
    data = memory.template take<T>(kTileRows * pitch);
  }

  // All threads call; complete after a barrier.
  ADAMIX_DEVICE void clear() const {
    constexpr int kSize = Piece<T>::kSize;
    for (int i = threadIdx.x * kSize; i < kTileRows * pitch; i += kTileThreads * kSize) {
      *reinterpret_cast<Piece<T>*>(data + i) = Piece<T>{};
    }
  }
};

// What a block that multiplies a tile of rows twice keeps in shared memory.
template <typename T, int Narrow>
struct RoutedTile {
  Stages<T, Narrow> stages;
  NarrowTile<T> narrow;  // what the first product leaves for the second
  TileRows rows;

  template <typename Memory>
  ADAMIX_BOTH RoutedTile(Memory& memory, int cols) : stages(memory), narrow(memory, cols), rows(memory) {}
};

}  // namespace adamix
