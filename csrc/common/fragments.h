// Matrix products of 16-bit tiles that lie in registers as they lie in memory.
//
// Lane 4 i + t holds 16 bytes of row i: columns 8 t to 8 t + 7 of 32, so a warp reads 64 bytes of each of 8 rows at
// once. A product may take its inner index in any order as long as both operands take the same one, and its columns in
// any order as long as its result is read so: with these orders no element changes lanes between memory, an operand, a
// sum and memory again. Sums are fp32.
#pragma once

#include "common/fragment_shape.h"

namespace adamix {

// One store of 16 bytes to global memory.
template <typename T>
ADAMIX_DEVICE void store_words(T* to, const Words& words) {
#if ADAMIX_ARCH > 0
  // Left to itself, the compiler takes some of them apart.
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.at[0]),
               "r"(words.at[1]), "r"(words.at[2]), "r"(words.at[3])
               : "memory");
#else
  *reinterpret_cast<Words*>(to) = words;
#endif
}

ADAMIX_DEVICE int fragment_row() { return threadIdx.x % 32 / 4; }
ADAMIX_DEVICE int fragment_part() { return threadIdx.x % 4; }
// Row i of an 8 x 8 tile stands for row 8 (i / 2) + i % 2 of the memory it comes from, or 4 (i / 2) + i % 2 of ranks.
ADAMIX_DEVICE int spread_row(int step) { return step * (fragment_row() / 2) + fragment_row() % 2; }

// The same words: what is made of them is made where this stands, not before a loop around it, in more registers.
ADAMIX_DEVICE Words here(Words words) {
#if ADAMIX_ARCH > 0
  asm volatile("" : "+r"(words.at[0]), "+r"(words.at[1]), "+r"(words.at[2]), "+r"(words.at[3]));
#endif
  return words;
}

#if defined(ADAMIX_HOST)
template <typename T>
ADAMIX_DEVICE float low_of(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <typename T>
ADAMIX_DEVICE float high_of(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <typename T>
ADAMIX_DEVICE uint32_t word_of(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
#else
template <typename T>
union Pair {
  uint32_t word;
  T values[2];
  ADAMIX_DEVICE explicit Pair(uint32_t bits) : word(bits) {}
};
template <typename T>
ADAMIX_DEVICE float low_of(uint32_t word) {
  return to_float(Pair<T>(word).values[0]);
}
template <typename T>
ADAMIX_DEVICE float high_of(uint32_t word) {
  return to_float(Pair<T>(word).values[1]);
}
template <>
ADAMIX_DEVICE float low_of<bfloat16>(uint32_t word) {
  return float_of_bits(word << 16);
}
template <>
ADAMIX_DEVICE float high_of<bfloat16>(uint32_t word) {
  return float_of_bits(word & 0xffff0000u);
}
template <typename T>
ADAMIX_DEVICE uint32_t word_of(float low, float high) {
  Pair<T> pair(0);
  pair.values[0] = from_float<T>(low);
  pair.values[1] = from_float<T>(high);
  return pair.word;
}
#if ADAMIX_ARCH >= 800
template <>
ADAMIX_DEVICE uint32_t word_of<bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
ADAMIX_DEVICE uint32_t word_of<half>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif
#endif

// sum[16 x 8] += a[16 x 16] b[16 x 8]. Lane 4 i + t holds of a: rows i (words 0, 2) and i + 8 (words 1, 3), two inner
// indices a word; of b: column i; of sum: rows i (0, 1) and i + 8 (2, 3), columns 2 t and 2 t + 1. All lanes call.
template <typename T>
ADAMIX_DEVICE void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                            uint32_t b1) {
#if defined(ADAMIX_HOST)
  host::Operands of;
  host::exchange_operands({a0, a1, a2, a3, b0, b1}, of);
  for (int out = 0; out < 4; ++out) {
    for (int part = 0; part < 8; ++part) {
      uint32_t left = of.left[part % 4][out / 2 + part / 4 * 2], right = of.right[out % 2][part % 4][part / 4];
      sum[out] = fmaf(low_of<T>(left), low_of<T>(right), sum[out]);
      sum[out] = fmaf(high_of<T>(left), high_of<T>(right), sum[out]);
    }
  }
#elif ADAMIX_ARCH >= 800
  if constexpr (kIsHalf<T>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#elif ADAMIX_ARCH >= 750
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// The same with both halves of 32 inner indices: top and bottom are 8 rows each, b[k] the words of column i.
template <typename T>
ADAMIX_DEVICE void multiply_rows(float (&sum)[4], const Words& top, const Words& bottom, uint32_t b0, uint32_t b1,
                                 uint32_t b2, uint32_t b3) {
  multiply<T>(sum, top.at[0], bottom.at[0], top.at[1], bottom.at[1], b0, b1);
  multiply<T>(sum, top.at[2], bottom.at[2], top.at[3], bottom.at[3], b2, b3);
}

// Lane 4 i + t holds columns 2 t and 2 t + 1 of row i of an 8 x 8 tile, and gets rows 2 t and 2 t + 1 of column i.
ADAMIX_DEVICE uint32_t transposed(uint32_t word) {
#if defined(ADAMIX_HOST)
  int lane = threadIdx.x % 32, i = lane / 4, t = lane % 4, shift = i % 2 * 16;
  uint32_t upper = host::exchange(word, 8 * t + i / 2), lower = host::exchange(word, 8 * t + 4 + i / 2);
  return (upper >> shift & 0xffffu) | (lower >> shift & 0xffffu) << 16;
#elif ADAMIX_ARCH >= 750
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
#else
  return word;
#endif
}

// Four 8 x 8 tiles in shared memory, transposed: word w holds rows row0 + 8 of bit `RowBit` of w + 2 t, + 1, and of
// columns col0 + 8 of the other bit, column i. at(row, piece): where 16 bytes of a row lie. All lanes call.
template <int RowBit, typename T, typename At>
ADAMIX_DEVICE void load_turned(uint32_t (&words)[4], const T* base, int row0, int col0, At at) {
#if defined(ADAMIX_HOST)
  int lane = threadIdx.x % 32, i = lane / 4, t = lane % 4;
  for (int w = 0; w < 4; ++w) {
    int row = row0 + 8 * (w >> RowBit & 1) + 2 * t, piece = col0 / 8 + (w >> (1 - RowBit) & 1);
    words[w] = base[at(row, piece) + i].bits | static_cast<uint32_t>(base[at(row + 1, piece) + i].bits) << 16;
  }
#elif ADAMIX_ARCH >= 750
  int w = threadIdx.x % 32 / 8;
  const T* from =
      base + at(row0 + 8 * (w >> RowBit & 1) + static_cast<int>(threadIdx.x) % 8, col0 / 8 + (w >> (1 - RowBit) & 1));
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
#endif
}

}  // namespace adamix
