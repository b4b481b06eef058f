#include "merge/most_merged.h"
#include "merge/shares.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {

int most_merged_experts(size_t available) {
  // The backward keeps the shares, and a part of the sums for every warp; the forward counts experts in 16 bits.
  auto bytes = [](int experts) {
    return shared_bytes<MergeShares<float>>(experts) + shared_bytes<MergeShares<float>>(kMergeThreads / 32 * experts);
  };
  int below = 1, above = 1 << 16;
  while (above - below > 1) {
    int middle = (below + above) / 2;
    (bytes(middle) <= available ? below : above) = middle;
  }
  return below;
}

}  // namespace adamix
#endif
