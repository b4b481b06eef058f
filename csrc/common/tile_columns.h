// How many narrow columns a tile of the routed ops' portable kernels holds: they all stand in a block's shared memory.
#pragma once

#include "common/platform.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {

// The most columns, a multiple of 16, of elements of 2 or 4 bytes where a block may have so much shared memory.
int most_tile_columns(int element_bytes, size_t shared_bytes);

}  // namespace adamix
#endif
