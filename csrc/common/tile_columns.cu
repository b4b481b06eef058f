#include "common/tile_columns.h"
#include "common/tile_rows.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {
namespace {

template <typename T>
int most_columns(size_t available) {
  int cols = kSmallRank;
  while (shared_bytes<RoutedTile<T, kChunk<T>>>(cols + 16) <= available) cols += 16;
  return cols;
}

}  // namespace

int most_tile_columns(int element_bytes, size_t shared_bytes) {
  return element_bytes == 4 ? most_columns<float>(shared_bytes) : most_columns<half>(shared_bytes);
}

}  // namespace adamix
#endif
