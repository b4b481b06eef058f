// Shared memory of a block: bounds, alignment, races between warps, copies in flight, what nobody wrote.
#include "memory.h"

namespace ptx {

bool check_shared(Warp& w, const Instruction& i, u32 address, int bytes, int lane, bool write, const u8* value,
                  bool async) {
  Block& b = *w.block;
  if (address % bytes) report(w, i, "misaligned shared access", address, lane);
  if (static_cast<u64>(address) + bytes > b.shared.size()) {
    report(w, i, write ? "shared store out of bounds" : "shared load out of bounds", address, lane);
    return false;
  }
  Mask others = ~(1u << w.id);
  for (int k = 0; k < bytes; k++) {
    SharedByte& s = b.shadow[address + k];
    if (s.in_flight && !async) {
      const char* kind = write ? "shared store under a cp.async in flight" : "shared load under a cp.async in flight";
      report(w, i, kind, address, lane);
    }
    if (b.launch->races && write) {
      bool same = value && b.shared[address + k] == value[k];
      if (s.written_epoch == b.epoch && s.written && s.written_warp != w.id && !same)
        report(w, i, "shared race: write after another warp's write", address, lane);
      if (s.read_epoch == b.epoch && s.readers & others && !same)
        report(w, i, "shared race: write after another warp's read", address, lane);
    } else if (b.launch->races) {
      if (s.written_epoch == b.epoch && s.written && s.written_warp != w.id)
        report(w, i, "shared race: read after another warp's write", address, lane);
      if (s.read_epoch != b.epoch) s.read_epoch = b.epoch, s.readers = 0;
      s.readers |= 1u << w.id;
    }
    if (write) s.written_epoch = b.epoch, s.written_warp = static_cast<u8>(w.id), s.written = 1;
  }
  return true;
}

bool is_defined(const Block& block, u32 address, int bytes) {
  for (int k = 0; k < bytes; k++)
    if (!block.shadow[address + k].defined) return false;
  return true;
}

void set_defined(Block& block, u32 address, int bytes, bool defined) {
  for (int k = 0; k < bytes; k++) block.shadow[address + k].defined = defined;
}

}  // namespace ptx
