// How many experts a bank may have to be merged: their shares stand in a block's shared memory.
#pragma once

#include "common/platform.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {

// The most, of scores of float32, where a block may have so much shared memory; scores of float64 take twice as much.
int most_merged_experts(size_t shared_bytes);

}  // namespace adamix
#endif
