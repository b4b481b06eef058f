// cp.async: nothing is there until the group is waited for, and what lies there meanwhile is nobody's.
#include <cstring>

#include "memory.h"
#include "registers.h"

namespace ptx {
namespace {

void copy_lane(Warp& w, const Instruction& i, u32 to, u64 from, int bytes, int given, int lane) {
  AsyncCopy copy{to, static_cast<u8>(bytes), {}};
  if (given == bytes) {
    if (check_global(w, i, from, bytes, lane, false, nullptr, false))
      memcpy(copy.data, reinterpret_cast<const u8*>(from), bytes);
    else
      memset(copy.data, kPoison, bytes);
  } else if (given) {
    if (from % bytes) report(w, i, "misaligned global access", from, lane);
    if (find_range(*w.block->launch, from, given))
      memcpy(copy.data, reinterpret_cast<const u8*>(from), given);
    else
      report(w, i, "global load out of bounds", from, lane);
  }
  if (!check_shared(w, i, to, bytes, lane, true, nullptr, true)) return;
  for (int k = 0; k < bytes; k++) {
    SharedByte& s = w.block->shadow[to + k];
    if (s.in_flight) report(w, i, "cp.async over a cp.async in flight", to, lane);
    s.in_flight = 1;
    w.block->shared[to + k] = kPoison;
  }
  w.open_copies.push_back(copy);
}

// in: shared address, global address, where given the bytes to read (the rest is zeros); imm: both offsets, bytes.
void copy(Warp& w, Instruction& i, Mask m) {
  int bytes = static_cast<int>(i.imm[2]);
  u64 from[kLanes];
  u32 to[kLanes], given[kLanes];
  Mask reading = 0;
  for (const Operand& o : i.in) need_defined(w, i, o, m, "an address that nobody set");
  for_lanes(m, [&](int l) {
    to[l] = static_cast<u32>(get(w, i.in[0], l) + i.imm[0]);
    from[l] = get(w, i.in[1], l) + static_cast<u64>(i.imm[1]);
    given[l] = i.in.size() > 2 ? static_cast<u32>(get(w, i.in[2], l)) : bytes;
    if (given[l] > static_cast<u32>(bytes)) {
      report(w, i, "cp.async source size too large", given[l], l);
      given[l] = bytes;
    }
    if (given[l]) reading |= 1u << l;
  });
  if (w.block->launch->statistics) {
    count_global(i, from, bytes, reading);
    count_shared(i, to, bytes, m);
  }
  for_lanes(m, [&](int l) { copy_lane(w, i, to[l], from[l], bytes, static_cast<int>(given[l]), l); });
}

void commit(Warp& w, Instruction&, Mask) {
  w.copy_groups.push_back(std::move(w.open_copies));
  w.open_copies.clear();
}

}  // namespace

void land_copies(Warp& w, size_t keep) {
  while (w.copy_groups.size() > keep) {
    for (const AsyncCopy& c : w.copy_groups.front())
      for (int k = 0; k < c.bytes; k++) {
        SharedByte& s = w.block->shadow[c.to + k];
        s.in_flight = 0, s.written_epoch = w.block->epoch, s.written_warp = static_cast<u8>(w.id);
        s.written = s.defined = 1;
        w.block->shared[c.to + k] = c.data[k];
      }
    w.copy_groups.erase(w.copy_groups.begin());
  }
}

void add_async_copies() {
  add_own("cp.async", copy);
  add_own("cp.async.commit_group", commit);
  add_own("cp.async.wait_group", [](Warp& w, Instruction& i, Mask) { land_copies(w, static_cast<size_t>(i.imm[0])); });
  add_own("cp.async.wait_all", [](Warp& w, Instruction& i, Mask m) {
    commit(w, i, m);
    land_copies(w, 0);
  });
}

}  // namespace ptx
