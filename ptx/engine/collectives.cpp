// What the lanes of a warp do together: shuffles, reductions, votes.
#include <algorithm>
#include <cstring>

#include "registers.h"

namespace ptx {
namespace {

enum Mode { kUp, kDown, kButterfly, kIndex };

// out: value, where given whether the other lane is within; in: value, which lane, clamp and segments, members; imm:
// Mode.
void shuffle(Warp& w, Instruction& i, Mask m) {
  u32 from[kLanes], within = 0;
  memcpy(from, lanes<u32>(w, i.in[0]), sizeof from);
  const u32 *by = lanes<u32>(w, i.in[1]), *clamps = lanes<u32>(w, i.in[2]), *members = lanes<u32>(w, i.in[3]);
  Parts source = undefined_parts(w, i.in[0]), bad;
  Mask control = undefined(w, i.in[1]) | undefined(w, i.in[2]) | undefined(w, i.in[3]);
  bad.fill(control & m);
  for_lanes(m, [&](int l) {
    if ((members[l] & w.alive) != m) report(w, i, "a shuffle executed by other lanes than its mask", members[l], l);
    int segment = clamps[l] >> 8 & 31, least = l & segment;
    int most = least | (clamps[l] & 31 & ~segment), step = by[l] & 31, other = l;
    bool inside = false;
    switch (i.imm[0]) {
      case kUp:
        other = l - step, inside = other >= most;
        break;
      case kDown:
        other = l + step, inside = other <= most;
        break;
      case kButterfly:
        other = l ^ step, inside = other <= most;
        break;
      case kIndex:
        other = least | (step & ~segment & 31), inside = other <= most;
        break;
    }
    if (!inside)
      other = l;
    else if (!(m >> other & 1))
      report(w, i, "a shuffle from an inactive lane", other, l);
    lanes<u32>(w, i.out[0])[l] = from[other];
    for (size_t k = 0; k < bad.size(); k++) bad[k] |= (source[k] >> other & 1) << l;
    within |= static_cast<u32>(inside) << l;
  });
  set_undefined(w, i.out[0], m, bad);
  set_predicate(w, i.out[1], m, within);
  set_undefined(w, i.out[1], m, control & m);
}

template <class T, auto F>
void reduce(Warp& w, Instruction& i, Mask m) {
  const T* a = lanes<T>(w, i.in[0]);
  T r = a[__builtin_ctz(m)];
  for_lanes(m & (m - 1), [&](int l) { r = F(r, a[l]); });
  Mask bad = undefined(w, i.in[0]) & m ? m : 0;
  for_lanes(m, [&](int l) { lanes<T>(w, i.out[0])[l] = r; });
  set_undefined(w, i.out[0], m, bad);
}

template <class T>
void add_reductions(const std::string& type) {
  add_own("redux.max." + type, reduce<T, [](T a, T b) { return std::max(a, b); }>, Kind::collective);
  add_own("redux.min." + type, reduce<T, [](T a, T b) { return std::min(a, b); }>, Kind::collective);
  add_own("redux.add." + type, reduce<T, [](T a, T b) { return static_cast<T>(static_cast<u32>(a) + b); }>,
          Kind::collective);
}

// out[0]: a predicate, F of which active lanes say yes and which are active.
template <auto F>
void vote(Warp& w, Instruction& i, Mask m) {
  set_predicate(w, i.out[0], m, F(predicate(w, i.in[0]) & m, m) ? m : 0);
  set_undefined(w, i.out[0], m, undefined(w, i.in[0]) & m ? m : 0);
}

void ballot(Warp& w, Instruction& i, Mask m) {
  u32 yes = predicate(w, i.in[0]) & m;
  for_lanes(m, [&](int l) { lanes<u32>(w, i.out[0])[l] = yes; });
  set_undefined(w, i.out[0], m, undefined(w, i.in[0]) & m ? m : 0);
}

}  // namespace

void add_collectives() {
  add_own("shfl", shuffle, Kind::collective);
  add_reductions<s32>("s32"), add_reductions<u32>("u32");
  add_own("redux.and.b32", reduce<u32, [](u32 a, u32 b) { return a & b; }>, Kind::collective);
  add_own("redux.or.b32", reduce<u32, [](u32 a, u32 b) { return a | b; }>, Kind::collective);
  add_own("redux.xor.b32", reduce<u32, [](u32 a, u32 b) { return a ^ b; }>, Kind::collective);
  add_own("vote.any", vote<[](Mask yes, Mask) { return yes != 0; }>, Kind::collective);
  add_own("vote.all", vote<[](Mask yes, Mask m) { return yes == m; }>, Kind::collective);
  add_own("vote.ballot", ballot, Kind::collective);
  add("bar.warp", [](Warp&, Instruction&, Mask) {}, Kind::collective);
  add("bra", nullptr, Kind::branch), add("ret", nullptr, Kind::leave), add("bar", nullptr, Kind::barrier);
}

}  // namespace ptx
