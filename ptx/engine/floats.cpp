// float32, with and without .ftz, and float64. What a GPU approximates is exact here.
#include "numbers.h"
#include "registers.h"

namespace ptx {
namespace {

// A GPU has one NaN as a result, whatever came in; this processor keeps the operand's bits.
float one_nan(float x) { return x == x ? x : as_float(0x7fffffffu); }

template <auto F>
void one(const std::string& op) {
  lanewise<[](float a) -> float { return one_nan(F(a)); }>(op + ".f32");
  lanewise<[](float a) -> float { return one_nan(flush(F(flush(a)))); }>(op + ".ftz.f32");
}

template <auto F>
void two(const std::string& op) {
  lanewise<[](float a, float b) -> float { return one_nan(F(a, b)); }>(op + ".f32");
  lanewise<[](float a, float b) -> float { return one_nan(flush(F(flush(a), flush(b)))); }>(op + ".ftz.f32");
}

}  // namespace

void add_floats() {
  for (const char* rounding : {"", ".rn"}) {
    two<[](float a, float b) { return a + b; }>(std::string("add") + rounding);
    two<[](float a, float b) { return a - b; }>(std::string("sub") + rounding);
    two<[](float a, float b) { return a * b; }>(std::string("mul") + rounding);
    lanewise<[](double a, double b) -> double { return a + b; }>(std::string("add") + rounding + ".f64");
    lanewise<[](double a, double b) -> double { return a - b; }>(std::string("sub") + rounding + ".f64");
    lanewise<[](double a, double b) -> double { return a * b; }>(std::string("mul") + rounding + ".f64");
  }
  for (const char* kind : {"div.full", "div.rn", "div.approx"}) two<[](float a, float b) { return a / b; }>(kind);
  two<[](float a, float b) { return larger(a, b); }>("max");
  two<[](float a, float b) { return smaller(a, b); }>("min");
  for (const char* order : {".f32", ".ftz.f32"}) {
    lanewise<[](float a, float b) -> float { return larger_or_nan(a, b); }>(std::string("max.NaN") + order);
    lanewise<[](float a, float b) -> float { return smaller_or_nan(a, b); }>(std::string("min.NaN") + order);
  }
  lanewise<[](float a, float b) -> float { return flush(larger_or_nan(flush(a), flush(b))); }>("max.ftz.NaN.f32");
  lanewise<[](float a, float b) -> float { return flush(smaller_or_nan(flush(a), flush(b))); }>("min.ftz.NaN.f32");
  lanewise<[](float sign, float a) -> float { return std::copysign(a, sign); }>("copysign.f32");
  lanewise<[](float a, float b, float c) -> float { return one_nan(std::fmaf(a, b, c)); }>("fma.rn.f32");
  lanewise<[](float a, float b, float c) -> float { return one_nan(flush(std::fmaf(flush(a), flush(b), flush(c)))); }>(
      "fma.rn.ftz.f32");
  one<[](float a) { return as_float(as_bits(a) ^ 0x80000000u); }>("neg");
  one<[](float a) { return std::fabs(a); }>("abs");
  one<[](float a) { return static_cast<float>(std::exp2(static_cast<double>(a))); }>("ex2.approx");
  one<[](float a) { return static_cast<float>(std::log2(static_cast<double>(a))); }>("lg2.approx");
  for (const char* kind : {"rcp.approx", "rcp.rn"}) one<[](float a) { return 1.0f / a; }>(kind);
  for (const char* kind : {"sqrt.approx", "sqrt.rn"}) one<[](float a) { return std::sqrt(a); }>(kind);
  one<[](float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }>("rsqrt.approx");
  one<[](float a) { return std::tanh(a); }>("tanh.approx");
  one<[](float a) { return std::sin(a); }>("sin.approx");
  one<[](float a) { return std::cos(a); }>("cos.approx");
  lanewise<[](double a, double b) -> double { return a / b; }>("div.rn.f64");
  lanewise<[](double a, double b, double c) -> double { return std::fma(a, b, c); }>("fma.rn.f64");
  lanewise<[](double a, double b) -> double { return larger(a, b); }>("max.f64");
  lanewise<[](double a, double b) -> double { return smaller(a, b); }>("min.f64");
  lanewise<[](double a) -> double { return -a; }>("neg.f64");
  lanewise<[](double a) -> double { return std::fabs(a); }>("abs.f64");
  lanewise<[](double a) -> double { return 1.0 / a; }>("rcp.rn.f64");
  lanewise<[](double a) -> double { return std::sqrt(a); }>("sqrt.rn.f64");
}

}  // namespace ptx
