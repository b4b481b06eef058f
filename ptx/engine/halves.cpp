// float16 and bfloat16, alone and in pairs: computed wide, rounded once.
#include "numbers.h"
#include "registers.h"

namespace ptx {
namespace {

template <class H, auto F>
u16 one(u16 a) {
  return H::narrow(F(H::widen(a)));
}

template <class H, auto F>
u16 two(u16 a, u16 b) {
  return H::narrow(F(H::widen(a), H::widen(b)));
}

u16 low(u32 pair) { return static_cast<u16>(pair); }
u16 high(u32 pair) { return static_cast<u16>(pair >> 16); }
u32 pair(u16 low, u16 high) { return low | static_cast<u32>(high) << 16; }

template <class H, auto F>
void one_of(const std::string& op, const std::string& type) {
  lanewise<[](u16 a) -> u16 { return one<H, F>(a); }>(op + "." + type);
  lanewise<[](u32 a) -> u32 { return pair(one<H, F>(low(a)), one<H, F>(high(a))); }>(op + "." + type + "x2");
}

template <class H, auto F>
void two_of(const std::string& op, const std::string& type) {
  lanewise<[](u16 a, u16 b) -> u16 { return two<H, F>(a, b); }>(op + "." + type);
  lanewise<[](u32 a, u32 b) -> u32 { return pair(two<H, F>(low(a), low(b)), two<H, F>(high(a), high(b))); }>(
      op + "." + type + "x2");
}

template <class H>
u16 multiply_add(u16 a, u16 b, u16 c) {
  return H::narrow(static_cast<double>(H::widen(a)) * H::widen(b) + H::widen(c));
}

template <class H>
void add_format(const std::string& type) {
  for (const char* rounding : {"", ".rn"}) {
    two_of<H, [](double a, double b) { return a + b; }>(std::string("add") + rounding, type);
    two_of<H, [](double a, double b) { return a - b; }>(std::string("sub") + rounding, type);
    two_of<H, [](double a, double b) { return a * b; }>(std::string("mul") + rounding, type);
  }
  two_of<H, [](float a, float b) { return larger(a, b); }>("max", type);
  two_of<H, [](float a, float b) { return smaller(a, b); }>("min", type);
  two_of<H, [](float a, float b) { return larger_or_nan(a, b); }>("max.NaN", type);
  two_of<H, [](float a, float b) { return smaller_or_nan(a, b); }>("min.NaN", type);
  lanewise<[](u16 a) -> u16 { return a ^ 0x8000; }>("neg." + type);
  lanewise<[](u32 a) -> u32 { return a ^ 0x80008000u; }>("neg." + type + "x2");
  lanewise<[](u16 a) -> u16 { return a & 0x7fff; }>("abs." + type);
  lanewise<[](u32 a) -> u32 { return a & 0x7fff7fffu; }>("abs." + type + "x2");
  lanewise<[](u16 a, u16 b, u16 c) -> u16 { return multiply_add<H>(a, b, c); }>("fma.rn." + type);
  lanewise<[](u32 a, u32 b, u32 c) -> u32 {
    return pair(multiply_add<H>(low(a), low(b), low(c)), multiply_add<H>(high(a), high(b), high(c)));
  }>("fma.rn." + type + "x2");
  one_of<H, [](float a) { return static_cast<float>(std::exp2(static_cast<double>(a))); }>("ex2.approx", type);
  one_of<H, [](float a) { return std::tanh(a); }>("tanh.approx", type);
}

}  // namespace

void add_halves() {
  add_format<Half>("f16");
  add_format<Bfloat>("bf16");
}

}  // namespace ptx
