// Sizes of the tiles that routed_tile.h multiplies.
#pragma once

#include "common/platform.h"

namespace adamix {

constexpr int kTileRows = 64;
constexpr int kTileCols = 64;  // columns of a wide tensor that a block computes at a time
constexpr int kTileThreads = 128;
constexpr int kWarpRows = 16;  // each of the four warps computes its own rows of the tile

// Columns of a product's inner dimension loaded at a time: 128 bytes of a row.
template <typename T>
constexpr int kInner = 128 / sizeof(T);

// The two widths of a narrow product: up to 16 columns, or chunks of kChunk. fp32 has half of it, as T4's blocks have
// 64 KiB of shared memory.
constexpr int kSmallRank = 16;
template <typename T>
constexpr int kChunk = sizeof(T) == 4 ? 32 : 64;

// The width that `ranks` columns are multiplied with.
template <typename T>
ADAMIX_BOTH constexpr int narrow_of(int ranks) {
  return ranks <= kSmallRank ? kSmallRank : kChunk<T>;
}

ADAMIX_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
ADAMIX_BOTH constexpr int max_of(int a, int b) { return a > b ? a : b; }
ADAMIX_BOTH constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Blocks of kTileRows rows.
ADAMIX_BOTH unsigned count_tiles(int64_t rows) { return static_cast<unsigned>((rows + kTileRows - 1) / kTileRows); }

}  // namespace adamix
