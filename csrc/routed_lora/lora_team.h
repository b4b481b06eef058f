// Eight warps and the 32 rows they serve, where each row is 16-byte pieces and 16-bit numbers are multiplied in
// registers (common/fragments.h). Which expert serves row i is known to lane i of every warp.
#pragma once

#include "common/launch.h"
#include "common/rows.h"
#include "common/shared_memory.h"
#include "common/tile_sizes.h"
#include "common/warp.h"
#include "common/words.h"

namespace adamix {

constexpr int kTeamRows = 32;
constexpr int kTeamWarps = 8;
constexpr int kTeamThreads = 32 * kTeamWarps;
constexpr int kStep = 32;  // columns that a warp takes at a time, eight of them a lane

struct alignas(8) FloatPair {
  float low, high;
};

// What a lane of a product holds: rows g, g + 8, g + 16, g + 24 of the team, and of each step eight columns from 8 q.
//
// A block is one team or two. Two share the factors in L1: warps that load the same of them are neighbours.
struct LaneRows {
  int teams, team;
  int64_t first;  // row of the team
  int count;      // of them, kTeamRows at most; below 1 for a team behind the last row
  int last;       // row of all
  int warp, lane, g, q;

  ADAMIX_DEVICE explicit LaneRows(int64_t rows) {
    int two = blockDim.x > kTeamThreads ? 1 : 0, number = threadIdx.x / 32;
    teams = 1 + two, team = number & two, warp = number >> two;
    first = (static_cast<int64_t>(blockIdx.x) * teams + team) * kTeamRows;
    count = rows - first < kTeamRows ? static_cast<int>(rows - first) : kTeamRows;
    last = static_cast<int>(rows) - 1;
    lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  }
  // Of kTeamThreads.
  ADAMIX_DEVICE int thread() const { return 32 * warp + lane; }
  // Of a tile of 8 x 8 that is turned: what its row g stands for, a step of pieces away from the next pair of rows.
  ADAMIX_DEVICE int spread(int step) const { return g / 2 * step + g % 2; }
  // Row i of the lane's four, in the team.
  ADAMIX_DEVICE int row(int i) const { return 8 * i + g; }
  // The same of all rows; the last row for one behind it.
  ADAMIX_DEVICE int number(int i) const { return row(i) < count ? static_cast<int>(first) + row(i) : last; }
};

// One side's experts of the team's rows; each lane knows that of its own row, kNoExpert where there is none.
struct TeamExperts {
  int mine = kNoExpert, lowest = kNoExpert;
  bool one = true;  // all rows have the lowest

  TeamExperts() = default;
  // own: of row `lane`, kNoExpert behind the last. All lanes call.
  ADAMIX_DEVICE TeamExperts(int own, const LaneRows& at) : mine(own), lowest(warp_reduce(own, Min{})) {
    one = __ballot_sync(0xffffffffu, at.lane < at.count && own != lowest) == 0;
  }
  // The smallest above `previous`, or kNoExpert. All lanes call.
  ADAMIX_DEVICE int after(int previous) const {
    return one ? kNoExpert : warp_reduce(mine > previous ? mine : kNoExpert, Min{});
  }
  ADAMIX_DEVICE int of_row(int row) const { return __shfl_sync(0xffffffffu, mine, row); }
};

// What serves row `lane`, on both sides; a row that one of its ids puts into no bank has none on either.
struct LaneRouting {
  int narrow, wide;

  ADAMIX_DEVICE LaneRouting(const LaneRows& at, const Routing& of_narrow, const Routing& of_wide) {
    int number = static_cast<int>(at.first) + at.lane;
    bool inside = at.lane < at.count;
    narrow = inside ? of_narrow.expert(number) : kNoExpert, wide = inside ? of_wide.expert(number) : kNoExpert;
    if (narrow == kNoExpert || wide == kNoExpert) narrow = wide = kNoExpert;
  }
};

// The narrow results of the team's rows, as the second product takes them: a group's columns begin at a multiple of 16.
template <typename T>
struct NarrowRows {
  T* data;
  int group_pitch, pitch;

  // An odd number of 32 bytes a row: eight lanes' 8 bytes from four rows are in 32 banks.
  template <typename Memory>
  ADAMIX_BOTH NarrowRows(Memory& memory, int groups, int rank, int teams, int team)
      : group_pitch(round_up(rank, 16)), pitch(16 * (groups * ceil_div(rank, 16) | 1)) {
    data = memory.template take<T>(teams * kTeamRows * pitch) + team * kTeamRows * pitch;
  }
  // All threads call; complete after a barrier.
  ADAMIX_DEVICE void clear(const LaneRows& at) const {
    for (int i = at.thread(); i < kTeamRows * pitch / 8; i += kTeamThreads)
      store_words(data + 8 * i, uint4{0, 0, 0, 0});
  }
  // Words of 16 rows from 16 `half` on, of 16 inner columns from `col` on four a lane, from 4 q: those of row g and of
  // row g + 8.
  ADAMIX_DEVICE void load(const LaneRows& at, int half, int col, uint2& upper, uint2& lower) const {
    const T* from = data + (16 * half + at.g) * pitch + col + 4 * at.q;
    upper = load_words<uint2>(from), lower = load_words<uint2>(from + 8 * pitch);
  }
};

// sums += 16 rows times 8 columns over a step: the upper rows' and the lower rows' pieces, and the columns'.
template <typename T>
ADAMIX_DEVICE void multiply_step(float (&sums)[4], const uint4& upper, const uint4& lower, const uint4& cols) {
  multiply<T>(sums, upper.x, lower.x, upper.y, lower.y, cols.x, cols.y);
  multiply<T>(sums, upper.z, lower.z, upper.w, lower.w, cols.z, cols.w);
}

// `cols` columns of out from `start` on = those of base, or zeros, for the team's rows; both are multiples of 8.
template <typename T>
ADAMIX_DEVICE void copy_gap(const LaneRows& at, const Rows<const T>& base, T* out, int64_t width, int start, int cols) {
  for (int row = at.warp; row < at.count; row += kTeamWarps) {
    int number = static_cast<int>(at.first) + row;
    const T* from = base.data == nullptr ? nullptr : base.data + base.offset(number) + start;
    T* to = out + number * width + start;
#pragma unroll 4
    for (int col = 8 * at.lane; col < cols; col += 8 * 32) {
      store_piece_at(to + col, 0, from == nullptr ? uint4{0, 0, 0, 0} : load_words<uint4>(from + col));
    }
  }
}

// The columns a warp has at a time in the second product: kStep of a group.
struct OutColumns {
  int group, col;  // in the group, of the warp

  // `columns` after the ones held; a group ends with the warps' last whole or partial steps.
  ADAMIX_DEVICE void advance(int columns, int cols) {
    int all = round_up(cols, kStep);
    for (col += columns; col >= all; col -= all) ++group;
  }
};

#if defined(ADAMIX_LAUNCHERS)
// The blocks for `rows`: of two teams where no multiprocessor gets more rows to serve so. Team: what a block keeps in
// shared memory.
template <typename Team>
Shape shape_of_teams(int64_t rows, int groups, int rank, const Device& device) {
  auto most = [&](int64_t teams) {  // of one multiprocessor
    int64_t blocks = (rows + teams * kTeamRows - 1) / (teams * kTeamRows);
    return (blocks + device.multiprocessors - 1) / device.multiprocessors * teams;
  };
  size_t bytes = shared_bytes<Team>(groups, rank, 2, 0);
  int teams = most(2) <= most(1) && bytes <= static_cast<size_t>(device.shared_bytes) ? 2 : 1;
  if (teams == 1) bytes = shared_bytes<Team>(groups, rank, 1, 0);
  return {dim3(static_cast<unsigned>((rows + teams * kTeamRows - 1) / (teams * kTeamRows))), teams * kTeamThreads,
          bytes};
}
#endif

}  // namespace adamix
