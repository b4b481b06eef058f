// cvt: between whole numbers, and from and to floating formats.
#include "numbers.h"
#include "registers.h"

namespace ptx {
namespace {

// D from A, the value as C++ converts it.
template <class D, class A>
void plain(const std::string& name) {
  lanewise<[](A a) -> D { return static_cast<D>(a); }>("cvt." + name);
}

template <class F>
void from_integers(const std::string& to) {
  plain<F, s16>("rn." + to + ".s16"), plain<F, u16>("rn." + to + ".u16");
  plain<F, s32>("rn." + to + ".s32"), plain<F, u32>("rn." + to + ".u32");
  plain<F, s64>("rn." + to + ".s64"), plain<F, u64>("rn." + to + ".u64");
}

template <class F, auto Round>
void to_integers(const std::string& rounding, const std::string& from) {
  lanewise<[](F a) -> s32 { return saturate<s32>(Round(a)); }>("cvt." + rounding + ".s32." + from);
  lanewise<[](F a) -> u32 { return saturate<u32>(Round(a)); }>("cvt." + rounding + ".u32." + from);
  lanewise<[](F a) -> s64 { return saturate<s64>(Round(a)); }>("cvt." + rounding + ".s64." + from);
  lanewise<[](F a) -> u64 { return saturate<u64>(Round(a)); }>("cvt." + rounding + ".u64." + from);
  lanewise<[](F a) -> F { return Round(a); }>("cvt." + rounding + "." + from + "." + from);
}

template <auto Round>
void to_integers_flushed(const std::string& rounding) {
  lanewise<[](float a) -> s32 { return saturate<s32>(Round(flush(a))); }>("cvt." + rounding + ".ftz.s32.f32");
  lanewise<[](float a) -> float { return flush(Round(flush(a))); }>("cvt." + rounding + ".ftz.f32.f32");
}

template <class H>
void add_format(const std::string& type) {
  lanewise<[](u16 a) -> float { return H::widen(a); }>("cvt.f32." + type);
  lanewise<[](u16 a) -> float { return flush(H::widen(a)); }>("cvt.ftz.f32." + type);
  lanewise<[](u16 a) -> double { return H::widen(a); }>("cvt.f64." + type);
  lanewise<[](float a) -> u16 { return H::narrow(a); }>("cvt.rn." + type + ".f32");
  lanewise<[](double a) -> u16 { return H::narrow(a); }>("cvt.rn." + type + ".f64");
  lanewise<[](float high, float low) -> u32 { return static_cast<u32>(H::narrow(high)) << 16 | H::narrow(low); }>(
      "cvt.rn." + type + "x2.f32");
}

}  // namespace

void add_conversions() {
  plain<u64, u32>("u64.u32"), plain<s64, s32>("s64.s32"), plain<u64, u16>("u64.u16"), plain<s64, s16>("s64.s16");
  plain<u32, u64>("u32.u64"), plain<u16, u32>("u16.u32"), plain<u16, u64>("u16.u64");
  plain<u32, u16>("u32.u16"), plain<s32, s16>("s32.s16");
  // The low half of a wider register.
  lanewise<[](u64 a) -> s64 { return static_cast<s32>(a); }>("cvt.s64.s32.wide");
  lanewise<[](u64 a) -> u64 { return static_cast<u32>(a); }>("cvt.u64.u32.wide");
  lanewise<[](u32 a) -> s32 { return static_cast<s16>(a); }>("cvt.s32.s16.wide");
  lanewise<[](u32 a) -> u32 { return static_cast<u16>(a); }>("cvt.u32.u16.wide");
  // A byte lies in a register as wide as the result.
  lanewise<[](u16 a) -> s16 { return static_cast<s8>(a); }>("cvt.s16.s8");
  lanewise<[](u16 a) -> u16 { return static_cast<u8>(a); }>("cvt.u16.u8");
  lanewise<[](u32 a) -> s32 { return static_cast<s8>(a); }>("cvt.s32.s8");
  lanewise<[](u32 a) -> u32 { return static_cast<u8>(a); }>("cvt.u32.u8");
  lanewise<[](u64 a) -> s64 { return static_cast<s8>(a); }>("cvt.s64.s8");
  lanewise<[](u64 a) -> u64 { return static_cast<u8>(a); }>("cvt.u64.u8");
  add_format<Half>("f16");
  add_format<Bfloat>("bf16");
  from_integers<float>("f32");
  from_integers<double>("f64");
  plain<double, float>("f64.f32");
  plain<float, double>("rn.f32.f64");
  to_integers<float, [](float a) { return std::trunc(a); }>("rzi", "f32");
  to_integers<float, [](float a) { return std::nearbyint(a); }>("rni", "f32");
  to_integers<float, [](float a) { return std::floor(a); }>("rmi", "f32");
  to_integers<float, [](float a) { return std::ceil(a); }>("rpi", "f32");
  to_integers<double, [](double a) { return std::trunc(a); }>("rzi", "f64");
  to_integers<double, [](double a) { return std::nearbyint(a); }>("rni", "f64");
  to_integers<double, [](double a) { return std::floor(a); }>("rmi", "f64");
  to_integers<double, [](double a) { return std::ceil(a); }>("rpi", "f64");
  to_integers_flushed<[](float a) { return std::trunc(a); }>("rzi");
  to_integers_flushed<[](float a) { return std::nearbyint(a); }>("rni");
  to_integers_flushed<[](float a) { return std::floor(a); }>("rmi");
  lanewise<[](float a) -> float { return std::isnan(a) ? 0.0f : std::fmin(std::fmax(a, 0.0f), 1.0f); }>(
      "cvt.sat.f32.f32");
  lanewise<[](float a) -> u32 {
    return std::isnan(a) || std::isinf(a) ? as_bits(a) : (as_bits(a) + 0x1000u) & 0xffffe000u;
  }>("cvt.rna.tf32.f32");
}

}  // namespace ptx
