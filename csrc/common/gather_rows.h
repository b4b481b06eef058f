// The rows that one expert serves, found and listed in their order, without sorting and without atomics.
#pragma once

#include "common/routed_tile.h"

namespace adamix {

constexpr int kScan = 1024;                 // rows looked at in one go
constexpr int kListed = kScan + kTileRows;  // what one go finds, and the rest of the one before
constexpr int kWarps = kTileThreads / 32;

struct RowList {
  int* row;         // counted from the first row of the block's share
  int64_t* offset;  // of the row in the wide operand
  int* found;       // by each warp

  template <typename Memory>
  ADAMIX_BOTH explicit RowList(Memory& memory) {
    row = memory.template take<int>(kListed);
    offset = memory.template take<int64_t>(kListed);
    found = memory.template take<int>(kWarps);
  }

  // Appends the rows among [from, from + count), count <= kScan, that `expert` serves behind the `held` listed ones,
  // and returns how many are listed then; not those whose `other` id is of no expert. All threads call; complete on
  // return.
  template <typename T>
  ADAMIX_DEVICE int append(int held, int first, int from, int count, const Routing& routing, const Routing& other,
                           int expert, const Rows<const T>& wide) const {
    constexpr int kRounds = kScan / kTileThreads;
    int rounds = ceil_div(count, kTileThreads);  // of 32 rows a warp
    int start = from + this_warp() * rounds * 32;
    uint32_t mine[kRounds];
    int total = 0;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      mine[i] = 0;
      if (i < rounds) {
        int at = start + i * 32 + this_lane();
        bool served = at < from + count && routing.expert(first + at) == expert;
        mine[i] = __ballot_sync(0xffffffffu, served && other.expert(first + at) != kNoExpert);
      }
      total += __popc(mine[i]);
    }
    if (this_lane() == 0) found[this_warp()] = total;
    __syncthreads();
    int place = held, all = held;
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < this_warp()) place += found[warp];
      all += found[warp];
    }
    uint32_t before = (1u << this_lane()) - 1;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      if (mine[i] >> this_lane() & 1) {
        int at = start + i * 32 + this_lane();
        int to = place + __popc(mine[i] & before);
        row[to] = at;
        offset[to] = wide.offset(first + at);
      }
      place += __popc(mine[i]);
    }
    __syncthreads();
    return all;
  }

  // Keeps the rows from `done` on, fewer than kTileRows and than `done`, as the first ones; complete after a barrier.
  ADAMIX_DEVICE void keep(int done, int held) const {
    int at = done + threadIdx.x;
    if (done == 0 || at >= held) return;
    row[threadIdx.x] = row[at];
    offset[threadIdx.x] = offset[at];
  }
};

}  // namespace adamix
