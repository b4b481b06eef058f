// Registers: 32 values each, a predicate one 32-bit mask; and the table of what the executor can run.
#pragma once

#include <string>
#include <tuple>
#include <utility>

#include "engine.h"

namespace ptx {

template <class T>
T* lanes(Warp& w, const Operand& o) {
  return reinterpret_cast<T*>(w.registers + o.offset);
}

inline u32& predicate(Warp& w, const Operand& o) { return *lanes<u32>(w, o); }

inline void set_predicate(Warp& w, const Operand& o, Mask m, u32 value) {
  if (o.offset >= 0) predicate(w, o) = (predicate(w, o) & ~m) | (value & m);
}

inline Mask undefined(const Warp& w, const Operand& o) { return w.undefined[o.shadow]; }

inline void set_undefined(Warp& w, const Operand& o, Mask m, Mask bad) {
  if (!o.shadow) return;
  w.undefined[o.shadow] = (w.undefined[o.shadow] & ~m) | (bad & m);
  if (bad & m)
    for (Mask& part : w.parts[o.shadow]) part |= bad & m;
}

// The same by parts, for what moves them about: half of a register may be nobody's, and dropped later.
inline Parts undefined_parts(const Warp& w, const Operand& o) {
  Parts parts = w.parts[o.shadow];
  for (Mask& part : parts) part &= undefined(w, o);
  return parts;
}

inline void set_undefined(Warp& w, const Operand& o, Mask m, const Parts& bad) {
  if (!o.shadow) return;
  Mask any = 0;
  for (size_t k = 0; k < bad.size(); k++)
    w.parts[o.shadow][k] = (w.parts[o.shadow][k] & ~m) | (bad[k] & m), any |= bad[k];
  w.undefined[o.shadow] = (w.undefined[o.shadow] & ~m) | (any & m);
}

// Reports `kind` where one of these lanes holds a value that nobody set.
inline void need_defined(Warp& w, const Instruction& i, const Operand& o, Mask m, const char* kind) {
  if (Mask bad = undefined(w, o) & m) report(w, i, kind, 0, __builtin_ctz(bad));
}

inline void need_whole_warp(Warp& w, const Instruction& i, Mask m) {
  if (m != kAll) report(w, i, "a matrix instruction without the whole warp", m, 0);
}

// An integer of 2, 4 or 8 bytes in any register.
inline u64 get(Warp& w, const Operand& o, int lane) {
  if (o.bytes == 8) return lanes<u64>(w, o)[lane];
  return o.bytes == 4 ? lanes<u32>(w, o)[lane] : lanes<u16>(w, o)[lane];
}

inline void put(Warp& w, const Operand& o, int lane, u64 value) {
  if (o.offset < 0) return;
  if (o.bytes == 8)
    lanes<u64>(w, o)[lane] = value;
  else if (o.bytes == 4)
    lanes<u32>(w, o)[lane] = static_cast<u32>(value);
  else
    lanes<u16>(w, o)[lane] = static_cast<u16>(value);
}

template <class F>
void for_lanes(Mask m, F f) {
  for (int l = 0; l < kLanes; l++)
    if (m >> l & 1) f(l);
}

struct Entry {
  Handler run;
  Kind kind;
  bool spreads;
};

// Name -> how it runs. An instruction that is not in here cannot be loaded.
std::unordered_map<std::string, Entry>& table();

inline void add(const std::string& name, Handler run, Kind kind = Kind::plain, bool spreads = true) {
  table()[name] = {run, kind, spreads};
}

inline void add_own(const std::string& name, Handler run, Kind kind = Kind::plain) { add(name, run, kind, false); }

template <class F>
struct Lanewise;

template <class C, class D, class... A>
struct Lanewise<D (C::*)(A...) const> {
  template <auto F, size_t... K>
  static void each(Warp& w, Instruction& i, Mask m, std::index_sequence<K...>) {
    D* d = lanes<D>(w, i.out[0]);
    std::tuple<const A*...> a{lanes<A>(w, i.in[K])...};
    if (m == kAll) {
      for (int l = 0; l < kLanes; l++) d[l] = F(std::get<K>(a)[l]...);
    } else {
      for_lanes(m, [&](int l) { d[l] = F(std::get<K>(a)[l]...); });
    }
  }
  template <auto F>
  static void run(Warp& w, Instruction& i, Mask m) {
    each<F>(w, i, m, std::index_sequence_for<A...>());
  }
};

// out[0] = F(in[0], in[1], ...) in every lane; the types are F's.
template <auto F>
void lanewise(const std::string& name) {
  add(name, Lanewise<decltype(&decltype(F)::operator())>::template run<F>);
}

void add_integers();
void add_floats();
void add_halves();
void add_conversions();
void add_moves();
void add_calls();
void add_comparisons();
void add_memory();
void add_async_copies();
void add_matrices();
void add_wgmma();
void add_wmma();
void add_collectives();

}  // namespace ptx
