// How the routed ops' kernels are launched: the width of the narrow product, the grid, the shared memory.
#pragma once

#include "common/launch.h"
#include "common/tile_rows.h"
#include "common/weight_grad.h"

#if defined(ADAMIX_LAUNCHERS)
#include <type_traits>

namespace adamix {

// Calls body(std::integral_constant<int, Narrow>{}) with the width that `ranks` columns are multiplied with.
template <typename T, typename Body>
void dispatch_narrow(int ranks, Body&& body) {
  if (narrow_of<T>(ranks) == kSmallRank) {
    body(std::integral_constant<int, kSmallRank>{});
  } else {
    body(std::integral_constant<int, kChunk<T>>{});
  }
}

// One block for every tile of params.rows; the kernel takes a RoutedTile with `cols` columns of narrow results.
template <typename T, int Narrow, typename Params>
void launch_tiles(const char* name, void (*kernel)(Params), int cols, const Device& device, const Params& params) {
  Shape shape{dim3(count_tiles(params.rows)), kTileThreads, shared_bytes<RoutedTile<T, Narrow>>(cols)};
  launch(name, kernel, shape, device, params);
}

// The blocks of both sides' jobs, for every share of the rows; the kernel takes a GradTile.
template <typename T, int Narrow, typename Params>
void launch_weight_grad(const char* name, void (*kernel)(Params), const GradSide<T>& first, const GradSide<T>& second,
                        const Device& device, const Params& params) {
  int jobs = first.experts * blocks_an_expert(first, Narrow) + second.experts * blocks_an_expert(second, Narrow);
  dim3 grid(jobs, params.shares.count);
  launch(name, kernel, {grid, kTileThreads, shared_bytes<GradTile<T, Narrow>>()}, device, params);
}

}  // namespace adamix
#endif
