// Whole numbers and bits.
#include <algorithm>

#include "registers.h"

namespace ptx {
namespace {

u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u64 v = static_cast<u64>(b) << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 k = selector >> 4 * i & 15;
    u8 x = static_cast<u8>(v >> 8 * (k & 7));
    if (k & 8) x = x & 0x80 ? 0xff : 0;
    r |= static_cast<u32>(x) << 8 * i;
  }
  return r;
}

u32 by_truth_table(u32 a, u32 b, u32 c, u32 truth) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if (truth >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}

// Bits first to first + count of a; T signed: the last of them fills the rest.
template <class T>
T extract(T a, u32 first, u32 count) {
  constexpr int width = 8 * sizeof(T);
  using U = std::make_unsigned_t<T>;
  first &= 255, count &= 255;
  U from = static_cast<U>(a), r = 0, fill = 0;
  if (!count) return 0;
  if (std::is_signed_v<T>) fill = from >> std::min<int>(static_cast<int>(first + count) - 1, width - 1) & 1;
  for (int i = 0; i < width; i++) {
    bool inside = static_cast<u32>(i) < count && static_cast<int>(first) + i < width;
    r |= (inside ? from >> (first + i) & 1 : fill) << i;
  }
  return static_cast<T>(r);
}

u32 insert(u32 field, u32 into, u32 first, u32 count) {
  first &= 255, count &= 255;
  for (u32 i = 0; i < count && first + i < 32; i++)
    into = (into & ~(1u << (first + i))) | (field >> i & 1) << (first + i);
  return into;
}

// The upper half of b:a shifted left.
u32 funnel_left(u32 a, u32 b, u32 n) { return n ? b << n | a >> (32 - n) : b; }

u32 reversed(u32 x) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}

// What does not ask for a sign; U unsigned.
template <class U>
void add_bits(const std::string& bits) {
  constexpr u32 width = 8 * sizeof(U);
  lanewise<[](U a, U b) -> U { return a + b; }>("add.s" + bits);
  lanewise<[](U a, U b) -> U { return a - b; }>("sub.s" + bits);
  lanewise<[](U a, U b) -> U { return static_cast<u64>(a) * b; }>("mul.lo.s" + bits);
  lanewise<[](U a, U b, U c) -> U { return static_cast<u64>(a) * b + c; }>("mad.lo.s" + bits);
  lanewise<[](U a) -> U { return U(0) - a; }>("neg.s" + bits);
  lanewise<[](U a, U b) -> U { return a & b; }>("and.b" + bits);
  lanewise<[](U a, U b) -> U { return a | b; }>("or.b" + bits);
  lanewise<[](U a, U b) -> U { return a ^ b; }>("xor.b" + bits);
  lanewise<[](U a) -> U { return ~a; }>("not.b" + bits);
  lanewise<[](U a, u32 n) -> U { return n >= width ? 0 : a << n; }>("shl.b" + bits);
  for (const char* kind : {"shr.u", "shr.b"})
    lanewise<[](U a, u32 n) -> U { return n >= width ? U(0) : U(a >> n); }>(kind + bits);
}

template <class T>
void add_signed_or_not(const std::string& type) {
  constexpr u32 width = 8 * sizeof(T);
  lanewise<[](T a, T b) -> T { return std::min(a, b); }>("min." + type);
  lanewise<[](T a, T b) -> T { return std::max(a, b); }>("max." + type);
  // On a GPU a division by zero gives all ones, and the lowest number divided by -1 gives itself.
  lanewise<[](T a, T b) -> T {
    if (b == 0) return static_cast<T>(-1);
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0u - static_cast<std::make_unsigned_t<T>>(a))
                                                          : a / b;
  }>("div." + type);
  lanewise<[](T a, T b) -> T {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? 0 : a % b;
  }>("rem." + type);
  if constexpr (std::is_signed_v<T>) {
    lanewise<[](T a, u32 n) -> T { return (a >> std::min(n, width - 1)); }>("shr." + type);
    lanewise<[](T a) -> T { return a < 0 ? static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a)) : a; }>("abs." +
                                                                                                               type);
  }
}

// mul.hi and mul.wide; D is twice as wide as T.
template <class T, class D>
void add_wide(const std::string& type) {
  lanewise<[](T a, T b) -> T { return static_cast<T>((static_cast<D>(a) * b) >> (8 * sizeof(T))); }>("mul.hi." + type);
  if constexpr (sizeof(D) <= 8) {
    using U = std::make_unsigned_t<D>;
    lanewise<[](T a, T b) -> D { return static_cast<D>(a) * static_cast<D>(b); }>("mul.wide." + type);
    lanewise<[](T a, T b, D c) -> D {
      return static_cast<D>(static_cast<U>(static_cast<D>(a) * static_cast<D>(b)) + static_cast<U>(c));
    }>("mad.wide." + type);
  }
}

}  // namespace

void add_integers() {
  add_bits<u16>("16"), add_bits<u32>("32"), add_bits<u64>("64");
  add_signed_or_not<s16>("s16"), add_signed_or_not<s32>("s32"), add_signed_or_not<s64>("s64");
  add_signed_or_not<u16>("u16"), add_signed_or_not<u32>("u32"), add_signed_or_not<u64>("u64");
  add_wide<s16, s32>("s16"), add_wide<s32, s64>("s32"), add_wide<s64, __int128>("s64");
  add_wide<u16, u32>("u16"), add_wide<u32, u64>("u32"), add_wide<u64, unsigned __int128>("u64");
  lanewise<[](s32 a, s32 b) -> s32 { return std::max(std::min(a, b), 0); }>("min.relu.s32");
  lanewise<[](s32 a, s32 b) -> s32 { return std::max(std::max(a, b), 0); }>("max.relu.s32");
  lanewise<[](u32 a, u32 n, u32 c) -> u32 { return extract<u32>(a, n, c); }>("bfe.u32");
  lanewise<[](s32 a, u32 n, u32 c) -> s32 { return extract<s32>(a, n, c); }>("bfe.s32");
  lanewise<[](u64 a, u32 n, u32 c) -> u64 { return extract<u64>(a, n, c); }>("bfe.u64");
  lanewise<[](s64 a, u32 n, u32 c) -> s64 { return extract<s64>(a, n, c); }>("bfe.s64");
  lanewise<[](u32 a, u32 b, u32 n, u32 c) -> u32 { return insert(a, b, n, c); }>("bfi.b32");
  lanewise<[](u32 a, u32 b, u32 c) -> u32 { return permute_bytes(a, b, c); }>("prmt.b32");
  lanewise<[](u32 a, u32 b, u32 c, u32 t) -> u32 { return by_truth_table(a, b, c, t); }>("lop3.b32");
  lanewise<[](u32 a) -> u32 { return __builtin_popcount(a); }>("popc.b32");
  lanewise<[](u32 a) -> u32 { return a ? __builtin_clz(a) : 32; }>("clz.b32");
  lanewise<[](u32 a) -> u32 { return reversed(a); }>("brev.b32");
  lanewise<[](u32 a, u32 b, u32 c) -> u32 { return funnel_left(a, b, c & 31); }>("shf.l.wrap.b32");
  lanewise<[](u32 a, u32 b, u32 c) -> u32 { return c & 31 ? funnel_left(a, b, 32 - (c & 31)) : a; }>("shf.r.wrap.b32");
}

}  // namespace ptx
