// Functions that a kernel calls: what is passed, a register for each byte; warps.cpp goes there and back.
#include "registers.h"

namespace ptx {
namespace {

// out: bytes; in: values of imm[0] bytes each.
void store_passed(Warp& w, Instruction& i, Mask m) {
  size_t width = static_cast<size_t>(i.imm[0]);
  for (size_t k = 0; k < i.out.size(); k++) {
    const Operand& from = i.in[k / width];
    for_lanes(m, [&](int l) { put(w, i.out[k], l, get(w, from, l) >> 8 * (k % width) & 0xff); });
    set_undefined(w, i.out[k], m, undefined(w, from));
  }
}

// And back; imm[1]: whether they are signed.
void load_passed(Warp& w, Instruction& i, Mask m) {
  size_t width = static_cast<size_t>(i.imm[0]);
  for (size_t k = 0; k < i.out.size(); k++) {
    Mask bad = 0;
    for (size_t b = 0; b < width; b++) bad |= undefined(w, i.in[k * width + b]);
    for_lanes(m, [&](int l) {
      u64 value = 0;
      for (size_t b = 0; b < width; b++) value |= get(w, i.in[k * width + b], l) << 8 * b;
      int shift = static_cast<int>(64 - 8 * width);
      if (i.imm[1]) value = static_cast<u64>(static_cast<s64>(value << shift) >> shift);
      put(w, i.out[k], l, value);
    });
    set_undefined(w, i.out[k], m, bad);
  }
}

}  // namespace

void add_calls() {
  add_own("st.passed", store_passed), add_own("ld.passed", load_passed);
  add_own("call", nullptr, Kind::call), add_own("back", nullptr, Kind::back);
}

}  // namespace ptx
