// Global memory: the host's own, within the ranges that a launch was given.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "memory.h"

namespace ptx {
namespace {

bool holds(const Range& r, u64 address, u64 bytes) {
  return address >= r.low && address <= r.high && bytes <= r.high - address;
}

std::string nearest(const Launch& launch, u64 address, int bytes) {
  u64 best = ~0ull;
  std::string said = std::to_string(bytes) + " bytes, no tensor at all";
  for (size_t k = 0; k < launch.ranges.size(); k++) {
    const Range& r = launch.ranges[k];
    u64 far = address < r.low ? r.low - address : address >= r.high ? address - r.high : 0;
    if (far >= best) continue;
    best = far;
    said = std::to_string(bytes) + " bytes, at " + std::to_string(static_cast<s64>(address - r.low)) + " of " +
           std::to_string(r.high - r.low) + " of range #" + std::to_string(k);
  }
  return said;
}

// What a sector costs a cache: brought in by the block's first touch, kept until so many others came after it.
// Returns whether a load finds it in no L1; cached: whether it looks there. What L1 serves again leaves no distance.
bool age(Launch& launch, Range& r, u64 s, bool write, bool cached) {
  u32 last = std::max(r.read_at[s], r.written_at[s]);
  bool fresh = last <= launch.began;
  if (fresh) launch.clock++;
  if (write) {
    r.first_writes += r.written_at[s] <= launch.began;
    r.written_at[s] = launch.clock;
    return false;
  }
  r.first_reads += fresh;
  u32 since = launch.clock - last;
  bool missed = fresh || since > kNear;
  if (!fresh && (missed || !cached))
    launch.distances[since < 2 ? 0 : std::min(kDistances - 1, static_cast<int>(4 * std::log2(since)))]++;
  r.read_at[s] = launch.clock;
  return missed;
}

void touch(Launch& launch, const Instruction& i, Range& r, u64 address, int bytes, bool write, bool cached) {
  u64 base = r.low & ~31ull;
  if (r.touched.empty()) {
    size_t sectors = (r.high - base) / 32 + 2;
    r.touched.resize(sectors);
    r.read_at.reset(static_cast<u32*>(calloc(sectors, 4)));
    r.written_at.reset(static_cast<u32*>(calloc(sectors, 4)));
  }
  for (u64 s = (address - base) / 32; s <= (address + bytes - 1 - base) / 32; s++) {
    i.stats.distant += age(launch, r, s, write, cached);
    r.touched[s] |= write ? 2 : r.touched[s] & 2 ? 0 : 1;
  }
}

// What another block stored may be read when both took part in an atomic in between: the other's store was before its
// own, by the same warp or a barrier, and this load comes after.
bool ordered_by_atomics(const Launch& launch, const Warp& w, const GlobalByte& byte) {
  auto mine = launch.atomics.find(w.block->linear), its = launch.atomics.find(byte.written_block);
  if (mine == launch.atomics.end() || its == launch.atomics.end()) return false;
  bool released = byte.written_epoch < its->second.first || byte.written_warp == its->second.second;
  bool acquired = w.block->epoch > mine->second.first || w.id == mine->second.second;
  return released && acquired;
}

void check_write(Warp& w, const Instruction& i, GlobalByte& g, u64 address, int lane, bool same) {
  int block = w.block->linear;
  u32 epoch = w.block->epoch;
  if (g.written_block >= 0 && !same) {
    if (g.written_block != block)
      report(w, i, "race: two blocks write different values", address, lane);
    else if (g.written_warp != w.id && g.written_epoch == epoch)
      report(w, i, "race: two warps write different values, no barrier", address, lane);
  }
  if (g.read_block >= 0 && !same) {
    if (g.read_block != block && w.block->launch->atomics.empty())
      report(w, i, "race: store over what another block read", address, lane);
    else if (g.read_block == block && g.read_warp != w.id && g.read_epoch == epoch)
      report(w, i, "race: store over what another warp read, no barrier", address, lane);
  }
  g.written_block = block, g.written_epoch = epoch, g.written_warp = static_cast<u8>(w.id);
}

void check_read(Warp& w, const Instruction& i, GlobalByte& g, u64 address, int lane) {
  int block = w.block->linear;
  u32 epoch = w.block->epoch;
  u8 warp = static_cast<u8>(w.id);
  if (g.written_block >= 0 && g.written_block != block) {
    if (!ordered_by_atomics(*w.block->launch, w, g))
      report(w, i, "race: load of what another block stored", address, lane);
  } else if (g.written_block >= 0 && g.written_warp != warp && g.written_epoch == epoch) {
    report(w, i, "race: load of another warp's global store, no barrier", address, lane);
  }
  if (g.read_block != block || g.read_epoch != epoch)
    g.read_block = block, g.read_epoch = epoch, g.read_warp = warp;
  else if (g.read_warp != warp)
    g.read_warp = 255;
}

}  // namespace

Range* find_range(Launch& launch, u64 address, u64 bytes) {
  if (launch.ranges.empty()) return nullptr;
  if (holds(launch.ranges[launch.last_range], address, bytes)) return &launch.ranges[launch.last_range];
  for (size_t k = 0; k < launch.ranges.size(); k++)
    if (holds(launch.ranges[k], address, bytes)) return &launch.ranges[launch.last_range = k];
  return nullptr;
}

bool check_global(Warp& w, const Instruction& i, u64 address, int bytes, int lane, bool write, const u8* value,
                  bool cached) {
  Launch& launch = *w.block->launch;
  if (address % bytes) report(w, i, "misaligned global access", address, lane);
  Range* r = find_range(launch, address, bytes);
  if (!r) {
    const char* kind = write ? "global store out of bounds" : "global load out of bounds";
    report(w, i, kind, address, lane, nearest(launch, address, bytes));
    return false;
  }
  if (launch.statistics) touch(launch, i, *r, address, bytes, write, cached);
  if (!launch.races) return true;
  auto& shadow = launch.global_shadow[r->low];
  if (shadow.empty()) shadow.resize(r->high - r->low);
  for (int k = 0; k < bytes; k++) {
    GlobalByte& g = shadow[address - r->low + k];
    if (write)
      check_write(w, i, g, address, lane, value && *reinterpret_cast<const u8*>(address + k) == value[k]);
    else
      check_read(w, i, g, address, lane);
  }
  return true;
}

}  // namespace ptx
