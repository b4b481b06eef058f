// Moves, packing, selection, predicates.
#include <cstring>

#include "registers.h"

namespace ptx {
namespace {

template <class T>
void move(Warp& w, Instruction& i, Mask m) {
  const T* from = lanes<T>(w, i.in[0]);
  T* to = lanes<T>(w, i.out[0]);
  if (m == kAll)
    memmove(to, from, kLanes * sizeof(T));
  else
    for_lanes(m, [&](int l) { to[l] = from[l]; });
  set_undefined(w, i.out[0], m, undefined_parts(w, i.in[0]));
}

// out[0] holds all inputs side by side, the first lowest; and apart again.
template <class Whole, class Part>
void pack(Warp& w, Instruction& i, Mask m) {
  constexpr size_t each = sizeof(Part) / 2;
  Parts bad = {};
  for (size_t k = 0; k < i.in.size(); k++)
    for (size_t p = 0; p < each; p++) bad[k * each + p] = undefined_parts(w, i.in[k])[p];
  for_lanes(m, [&](int l) {
    Whole v = 0;
    for (size_t k = 0; k < i.in.size(); k++)
      v |= static_cast<Whole>(lanes<Part>(w, i.in[k])[l]) << 8 * sizeof(Part) * k;
    lanes<Whole>(w, i.out[0])[l] = v;
  });
  set_undefined(w, i.out[0], m, bad);
}

template <class Whole, class Part>
void unpack(Warp& w, Instruction& i, Mask m) {
  constexpr size_t each = sizeof(Part) / 2;
  Whole from[kLanes];  // it may be overwritten by the first part
  memcpy(from, lanes<Whole>(w, i.in[0]), sizeof from);
  Parts held = undefined_parts(w, i.in[0]);
  for (size_t k = 0; k < i.out.size(); k++) {
    if (i.out[k].offset < 0) continue;
    for_lanes(m, [&](int l) { lanes<Part>(w, i.out[k])[l] = static_cast<Part>(from[l] >> 8 * sizeof(Part) * k); });
    Parts bad = {};
    for (size_t p = 0; p < each; p++) bad[p] = held[k * each + p];
    set_undefined(w, i.out[k], m, bad);
  }
}

// Undefined where what is chosen is, not what is left.
template <class T>
void select(Warp& w, Instruction& i, Mask m) {
  const T *a = lanes<T>(w, i.in[0]), *b = lanes<T>(w, i.in[1]);
  u32 p = predicate(w, i.in[2]);
  Parts bad, first = undefined_parts(w, i.in[0]), second = undefined_parts(w, i.in[1]);
  for (size_t k = 0; k < bad.size(); k++) bad[k] = (first[k] & p) | (second[k] & ~p) | undefined(w, i.in[2]);
  for_lanes(m, [&](int l) { lanes<T>(w, i.out[0])[l] = p >> l & 1 ? a[l] : b[l]; });
  set_undefined(w, i.out[0], m, bad);
}

template <auto F>
void predicates(const std::string& name) {
  add(name, [](Warp& w, Instruction& i, Mask m) {
    u32 a = predicate(w, i.in[0]), b = i.in.size() > 1 ? predicate(w, i.in[1]) : 0;
    set_predicate(w, i.out[0], m, F(a, b));
  });
}

}  // namespace

void add_moves() {
  add_own("mov.16", move<u16>), add_own("mov.32", move<u32>), add_own("mov.64", move<u64>);
  add_own("pack2.32", pack<u32, u16>), add_own("pack2.64", pack<u64, u32>), add_own("pack4.64", pack<u64, u16>);
  add_own("unpack2.32", unpack<u32, u16>), add_own("unpack2.64", unpack<u64, u32>);
  add_own("unpack4.64", unpack<u64, u16>);
  add_own("selp.16", select<u16>), add_own("selp.32", select<u32>), add_own("selp.64", select<u64>);
  predicates<[](u32 a, u32) { return a; }>("mov.pred");
  predicates<[](u32 a, u32 b) { return a & b; }>("and.pred");
  predicates<[](u32 a, u32 b) { return a | b; }>("or.pred");
  predicates<[](u32 a, u32 b) { return a ^ b; }>("xor.pred");
  predicates<[](u32 a, u32) { return ~a; }>("not.pred");
  add("selp.pred", [](Warp& w, Instruction& i, Mask m) {
    u32 a = predicate(w, i.in[0]), b = predicate(w, i.in[1]), p = predicate(w, i.in[2]);
    set_predicate(w, i.out[0], m, (a & p) | (b & ~p));
  });
  add("nop", [](Warp&, Instruction&, Mask) {});
}

}  // namespace ptx
