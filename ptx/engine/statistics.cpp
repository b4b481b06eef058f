// What memory access costs: sectors of 32 bytes that a warp's lanes touch, passes over the banks of shared memory.
#include <algorithm>

#include "memory.h"

namespace ptx {
namespace {

// Passes that the lanes first to first + count take: the most distinct words of one of the 32 banks.
int waves(const u32* addresses, const int* lanes, int count, int bytes) {
  u32 words[kLanes][32];
  int held[kLanes] = {}, worst = 0;
  for (int k = 0; k < count; k++)
    for (int part = 0; part < (bytes + 3) / 4; part++) {
      u32 word = addresses[lanes[k]] / 4 + part;
      int bank = word % 32;
      u32* end = words[bank] + held[bank];
      if (std::find(words[bank], end, word) == end && held[bank] < 32) words[bank][held[bank]++] = word;
      worst = std::max(worst, held[bank]);
    }
  return worst;
}

}  // namespace

void count_global(Instruction& i, const u64* addresses, int bytes, Mask m) {
  std::vector<u64> starts, sectors;
  for (int l = 0; l < kLanes; l++)
    if (m >> l & 1) starts.push_back(addresses[l]);
  i.stats.bytes += starts.size() * bytes;
  std::sort(starts.begin(), starts.end());
  starts.erase(std::unique(starts.begin(), starts.end()), starts.end());
  for (u64 a : starts)
    for (u64 s = a / 32; s <= (a + bytes - 1) / 32; s++) sectors.push_back(s);
  std::sort(sectors.begin(), sectors.end());
  i.stats.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  i.stats.least_sectors += (starts.size() * bytes + 31) / 32;
}

void count_shared(Instruction& i, const u32* addresses, int bytes, Mask m) {
  int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += together) {
    int lanes[kLanes], count = 0;
    for (int l = first; l < first + together; l++)
      if (m >> l & 1) lanes[count++] = l;
    if (!count) continue;
    i.stats.waves += waves(addresses, lanes, count, bytes);
    i.stats.least_waves += 1;
  }
}

void count_rows(Instruction& i, const u32* addresses, int first) {
  int lanes[8];
  for (int k = 0; k < 8; k++) lanes[k] = first + k;
  i.stats.waves += waves(addresses, lanes, 8, 16);
  i.stats.least_waves += 1;
}

}  // namespace ptx
