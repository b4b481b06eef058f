// How row pairs meet threads, by the number of their classes and by what the device holds.
#include <algorithm>

#include "consistency/consistency.h"

namespace adamix {
namespace {

// Rows of up to so many classes go to 4 lanes, to a warp.
constexpr int kFewClasses = 64, kWarpClasses = 1024;
// Tiles of such rows that one block takes in one launch, though more would be done sooner: a second launch costs more.
constexpr int kTilesAtOnce = 8;
// Threads that a multiprocessor holds, of 128 registers each.
constexpr int kThreadsHeld = 512;

}  // namespace

PairPlan plan_pairs(int rows, int classes, int element_bytes, const Device& device, int most) {
  int size = 16 / element_bytes, pieces = static_cast<int>((static_cast<int64_t>(classes) + 2 * (size - 1)) / size);
  // What a block costs beside its own shared memory, and what a multiprocessor has for it.
  int64_t kept = device.capability >= 80 ? 1024 : 0;
  auto blocks = [&](int lanes, int slots) -> int {
    if (slots > (1 << 20)) return 0;
    return static_cast<int>((device.shared_bytes + kept) /
                            (static_cast<int64_t>(pair_loss_bytes(lanes, slots)) + kept));
  };
  for (int lanes : {4, 32}) {
    int threads = pair_loss_threads(lanes), teams = threads / lanes, held = blocks(lanes, pieces);
    if (classes > (lanes == 4 ? kFewClasses : kWarpClasses) || held < 1) continue;
    int tiles = (rows + teams - 1) / teams, at_once = std::min(held, kThreadsHeld / threads);
    return {lanes, threads, 1, pieces, tiles <= kTilesAtOnce ? 1 : std::min(tiles, device.multiprocessors * at_once)};
  }
  // Two blocks a multiprocessor, so that logits come to one while the other computes; else one.
  for (int wanted : {2, 1}) {
    for (int cluster = 1; cluster <= most; cluster *= 2) {
      int slots = (pieces + cluster - 1) / cluster;
      if (blocks(0, slots) < wanted) continue;
      // Few rows: more blocks each, while there is enough for them to do.
      while (2 * cluster <= most && 2 * cluster * rows <= device.multiprocessors && slots > 1024) {
        cluster *= 2, slots = (pieces + cluster - 1) / cluster;
      }
      int held = blocks(0, slots), threads = slots > 1024 ? (wanted == 2 ? 256 : 512) : slots > 512 ? 256 : 128;
      // What a row costs beside its columns, it costs every warp: rather a third block, where rows are left for one.
      bool third = held > 2 && static_cast<int64_t>(rows) * cluster > 2 * int64_t{device.multiprocessors};
      if (slots > 1024 && third) threads = 128;
      int groups = device.multiprocessors * std::min(held, kThreadsHeld / threads) / cluster;
      // Large clusters may not all find room at once: not one row too many must wait for those that do.
      if (cluster > 2) groups *= 4;
      return {0, threads, cluster, slots, std::min(rows, std::max(groups, 1))};
    }
  }
  // Fewer than any row has, wherever it begins: a row without a tail has no lanes for what another's head adds.
  int slots = std::min(device.shared_bytes / 32, (classes - 1) / size);
  while (slots > 0 && blocks(0, slots) < 1) --slots;
  return {0, pair_loss_threads(0), 1, slots, std::min(rows, device.multiprocessors)};
}

}  // namespace adamix
