// setp: out[0] is the comparison, out[1] (where given) its opposite.
#include <cmath>

#include "numbers.h"
#include "registers.h"

namespace ptx {
namespace {

// Widen: a register's T to what is compared.
template <class T, auto Widen, auto F>
void compare(Warp& w, Instruction& i, Mask m) {
  const T *a = lanes<T>(w, i.in[0]), *b = lanes<T>(w, i.in[1]);
  u32 r = 0;
  for (int l = 0; l < kLanes; l++) r |= static_cast<u32>(F(Widen(a[l]), Widen(b[l]))) << l;
  set_predicate(w, i.out[0], m, r);
  set_predicate(w, i.out[1], m, ~r);
}

// Two values in a register, a predicate for each.
template <auto Widen, auto F>
void compare_pairs(Warp& w, Instruction& i, Mask m) {
  const u32 *a = lanes<u32>(w, i.in[0]), *b = lanes<u32>(w, i.in[1]);
  for (int k = 0; k < 2; k++) {
    u32 r = 0;
    for (int l = 0; l < kLanes; l++)
      r |= static_cast<u32>(F(Widen(static_cast<u16>(a[l] >> 16 * k)), Widen(static_cast<u16>(b[l] >> 16 * k)))) << l;
    set_predicate(w, i.out[k], m, r);
  }
}

constexpr auto kSame = [](auto a) { return a; };

template <class T>
void whole_numbers(const std::string& type) {
  add("setp.eq." + type, compare<T, kSame, [](T a, T b) { return a == b; }>);
  add("setp.ne." + type, compare<T, kSame, [](T a, T b) { return a != b; }>);
  for (const char* op : {"setp.lt.", "setp.lo."}) add(op + type, compare<T, kSame, [](T a, T b) { return a < b; }>);
  for (const char* op : {"setp.le.", "setp.ls."}) add(op + type, compare<T, kSame, [](T a, T b) { return a <= b; }>);
  for (const char* op : {"setp.gt.", "setp.hi."}) add(op + type, compare<T, kSame, [](T a, T b) { return (a > b); }>);
  for (const char* op : {"setp.ge.", "setp.hs."}) add(op + type, compare<T, kSame, [](T a, T b) { return (a >= b); }>);
}

// Pairs: whether T holds two 16-bit numbers.
template <class T, auto Widen, auto F, bool Pairs>
void floating(const std::string& name) {
  if constexpr (Pairs)
    add("setp." + name, compare_pairs<Widen, F>);
  else
    add("setp." + name, compare<T, Widen, F>);
}

template <class T, auto Widen, bool Pairs>
void floating_numbers(const std::string& type) {
  using F = decltype(Widen(std::conditional_t<Pairs, u16, T>()));
  floating<T, Widen, [](F a, F b) { return a == b; }, Pairs>("eq." + type);
  floating<T, Widen, [](F a, F b) { return (a < b || a > b); }, Pairs>("ne." + type);
  floating<T, Widen, [](F a, F b) { return a < b; }, Pairs>("lt." + type);
  floating<T, Widen, [](F a, F b) { return a <= b; }, Pairs>("le." + type);
  floating<T, Widen, [](F a, F b) { return (a > b); }, Pairs>("gt." + type);
  floating<T, Widen, [](F a, F b) { return (a >= b); }, Pairs>("ge." + type);
  // The same, or not comparable.
  floating<T, Widen, [](F a, F b) { return !(a < b || a > b); }, Pairs>("equ." + type);
  floating<T, Widen, [](F a, F b) { return a != b; }, Pairs>("neu." + type);
  floating<T, Widen, [](F a, F b) { return !(a >= b); }, Pairs>("ltu." + type);
  floating<T, Widen, [](F a, F b) { return !(a > b); }, Pairs>("leu." + type);
  floating<T, Widen, [](F a, F b) { return !(a <= b); }, Pairs>("gtu." + type);
  floating<T, Widen, [](F a, F b) { return !(a < b); }, Pairs>("geu." + type);
  floating<T, Widen, [](F a, F b) { return !(std::isnan(a) || std::isnan(b)); }, Pairs>("num." + type);
  floating<T, Widen, [](F a, F b) { return std::isnan(a) || std::isnan(b); }, Pairs>("nan." + type);
}

}  // namespace

void add_comparisons() {
  whole_numbers<s16>("s16"), whole_numbers<u16>("u16"), whole_numbers<u16>("b16");
  whole_numbers<s32>("s32"), whole_numbers<u32>("u32"), whole_numbers<u32>("b32");
  whole_numbers<s64>("s64"), whole_numbers<u64>("u64"), whole_numbers<u64>("b64");
  constexpr auto half = [](u16 a) { return Half::widen(a); };
  constexpr auto bfloat = [](u16 a) { return Bfloat::widen(a); };
  floating_numbers<float, [](float a) { return a; }, false>("f32");
  floating_numbers<float, [](float a) { return flush(a); }, false>("ftz.f32");
  floating_numbers<double, [](double a) { return a; }, false>("f64");
  floating_numbers<u16, half, false>("f16"), floating_numbers<u32, half, true>("f16x2");
  floating_numbers<u16, bfloat, false>("bf16"), floating_numbers<u32, bfloat, true>("bf16x2");
}

}  // namespace ptx
