// ld, st, ld.param and atomics.
#include <algorithm>
#include <cstring>

#include "memory.h"
#include "numbers.h"
#include "registers.h"

namespace ptx {
namespace {

s64 sign_extend(u64 v, int bytes) {
  int shift = 64 - 8 * bytes;
  return shift ? static_cast<s64>(v << shift) >> shift : static_cast<s64>(v);
}

// Addresses of the lanes: in[0] + imm[0].
template <class A>
void find_addresses(Warp& w, const Instruction& i, Mask m, A* to) {
  need_defined(w, i, i.in[0], m, "an address that nobody set");
  for_lanes(m, [&](int l) { to[l] = static_cast<A>(get(w, i.in[0], l) + static_cast<u64>(i.imm[0])); });
}

// The same of a load or store of so many bytes a lane, which is counted.
template <class A>
void find_counted(Warp& w, Instruction& i, Mask m, int bytes, A* to) {
  find_addresses(w, i, m, to);
  if (!w.block->launch->statistics) return;
  if constexpr (std::is_same_v<A, u64>)
    count_global(i, to, bytes, m);
  else
    count_shared(i, to, bytes, m);
}

// imm: offset, bytes of an element, elements, whether signed; in[0]: address; out: the elements.
template <bool Global>
void load(Warp& w, Instruction& i, Mask m) {
  int size = static_cast<int>(i.imm[1]), count = static_cast<int>(i.imm[2]), bytes = size * count;
  std::conditional_t<Global, u64, u32> at[kLanes];
  find_counted(w, i, m, bytes, at);
  Parts bad[8] = {};
  for_lanes(m, [&](int l) {
    u8 data[32];
    bool fine;
    if constexpr (Global)
      fine = check_global(w, i, at[l], bytes, l, false);
    else
      fine = check_shared(w, i, at[l], bytes, l, false);
    if (!fine)
      memset(data, kPoison, bytes);
    else if constexpr (Global)
      memcpy(data, reinterpret_cast<const u8*>(at[l]), bytes);
    else
      memcpy(data, &w.block->shared[at[l]], bytes);
    for (int k = 0; k < count; k++) {
      u64 v = 0;
      memcpy(&v, data + k * size, size);
      put(w, i.out[k], l, i.imm[3] ? static_cast<u64>(sign_extend(v, size)) : v);
      if constexpr (!Global)
        for (int b = 0; b < size && fine; b += 2)
          if (!is_defined(*w.block, at[l] + k * size + b, std::min(2, size))) bad[k][b / 2] |= 1u << l;
    }
  });
  for (int k = 0; k < count; k++) set_undefined(w, i.out[k], m, bad[k]);
}

// Two lanes of one store are in no order.
template <class A>
void check_lanes(Warp& w, const Instruction& i, Mask m, const A* at, const u8 (*data)[32], int bytes) {
  for_lanes(m, [&](int l) {
    for (int k = 0; k < l; k++) {
      if (!(m >> k & 1) || at[l] != at[k] || !memcmp(data[l], data[k], bytes)) continue;
      report(w, i, "race: two lanes store different values at one address", at[l], l);
      break;
    }
  });
}

// in[1] and on: the elements.
template <bool Global>
void store(Warp& w, Instruction& i, Mask m) {
  int size = static_cast<int>(i.imm[1]), count = static_cast<int>(i.imm[2]), bytes = size * count;
  std::conditional_t<Global, u64, u32> at[kLanes];
  find_counted(w, i, m, bytes, at);
  u8 data[kLanes][32];
  Parts bad[8];
  for (int k = 0; k < count; k++) {
    bad[k] = undefined_parts(w, i.in[1 + k]);
    if constexpr (Global) need_defined(w, i, i.in[1 + k], m, "a stored value that nobody set");
    for_lanes(m, [&](int l) {
      u64 v = get(w, i.in[1 + k], l);
      memcpy(data[l] + k * size, &v, size);
    });
  }
  if (w.block->launch->races) check_lanes(w, i, m, at, data, bytes);
  for_lanes(m, [&](int l) {
    if constexpr (Global) {
      if (check_global(w, i, at[l], bytes, l, true, data[l])) memcpy(reinterpret_cast<u8*>(at[l]), data[l], bytes);
    } else if (check_shared(w, i, at[l], bytes, l, true, data[l])) {
      memcpy(&w.block->shared[at[l]], data[l], bytes);
      for (int k = 0; k < count; k++)
        for (int b = 0; b < size; b += 2)
          set_defined(*w.block, at[l] + k * size + b, std::min(2, size), !(bad[k][b / 2] >> l & 1));
    }
  });
}

// By a generic address: below the bytes of the block's shared memory it is an offset there, else global memory's own.
void load_generic(Warp& w, Instruction& i, Mask m) {
  Mask inside = 0;
  for_lanes(m, [&](int l) {
    inside |= static_cast<Mask>(get(w, i.in[0], l) + static_cast<u64>(i.imm[0]) < w.block->shared.size()) << l;
  });
  if (m & inside) load<false>(w, i, m & inside);
  if (m & ~inside) load<true>(w, i, m & ~inside);
}

// imm: offset, bytes, whether signed.
void load_parameter(Warp& w, Instruction& i, Mask m) {
  int bytes = static_cast<int>(i.imm[1]);
  u64 v = 0;
  memcpy(&v, w.block->launch->parameters + i.imm[0], bytes);
  if (i.imm[2]) v = static_cast<u64>(sign_extend(v, bytes));
  for_lanes(m, [&](int l) { put(w, i.out[0], l, v); });
}

// in: address, value, for cas the value to put there; the lanes come one after another.
template <class T, auto F>
void atomic(Warp& w, Instruction& i, Mask m) {
  u64 at[kLanes];
  find_addresses(w, i, m, at);
  for (size_t k = 1; k < i.in.size(); k++) need_defined(w, i, i.in[k], m, "an atomic's value that nobody set");
  set_undefined(w, i.out[0], m, 0);
  for_lanes(m, [&](int l) {
    if (at[l] % sizeof(T)) report(w, i, "misaligned atomic", at[l], l);
    if (!find_range(*w.block->launch, at[l], sizeof(T))) {
      report(w, i, "atomic out of bounds", at[l], l);
      return;
    }
    T old, other = i.in.size() > 2 ? lanes<T>(w, i.in[2])[l] : T();
    memcpy(&old, reinterpret_cast<const u8*>(at[l]), sizeof(T));
    T fresh = F(old, lanes<T>(w, i.in[1])[l], other);
    memcpy(reinterpret_cast<u8*>(at[l]), &fresh, sizeof(T));
    if (i.out[0].offset >= 0) lanes<T>(w, i.out[0])[l] = old;
    w.block->launch->atomics[w.block->linear] = {w.block->epoch, w.id};
  });
}

template <class T>
void add_atomics(const std::string& type) {
  add_own("atom.add." + type, atomic<T, [](T old, T v, T) -> T { return old + v; }>);
  add_own("atom.exch." + type, atomic<T, [](T, T v, T) -> T { return v; }>);
  if constexpr (std::is_integral_v<T>) {
    add_own("atom.max." + type, atomic<T, [](T old, T v, T) -> T { return std::max(old, v); }>);
    add_own("atom.min." + type, atomic<T, [](T old, T v, T) -> T { return std::min(old, v); }>);
    add_own("atom.and." + type, atomic<T, [](T old, T v, T) -> T { return old & v; }>);
    add_own("atom.or." + type, atomic<T, [](T old, T v, T) -> T { return old | v; }>);
    add_own("atom.xor." + type, atomic<T, [](T old, T v, T) -> T { return old ^ v; }>);
    add_own("atom.cas." + type, atomic<T, [](T old, T v, T fresh) -> T { return old == v ? fresh : old; }>);
  }
}

}  // namespace

void add_memory() {
  add_own("ld.global", load<true>), add_own("ld.shared", load<false>), add_own("ld.generic", load_generic);
  add("ld.param", load_parameter);
  add_own("st.global", store<true>), add_own("st.shared", store<false>);
  add_atomics<s32>("s32"), add_atomics<u32>("u32"), add_atomics<u32>("b32"), add_atomics<float>("f32");
  add_atomics<s64>("s64"), add_atomics<u64>("u64"), add_atomics<u64>("b64"), add_atomics<double>("f64");
}

}  // namespace ptx
