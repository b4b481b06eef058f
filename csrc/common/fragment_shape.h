// The products of common/fragments.h as the host knows them: which GPUs have them, and how large they are.
#pragma once

#include "common/dtype.h"

namespace adamix {

// Whether the code compiled here has these products: fp16 from sm_75 on, bf16 from sm_80 on, and the CPU.
template <typename T>
constexpr bool kHasFragments = false;
template <>
constexpr bool kHasFragments<half> = ADAMIX_ARCH == 0 || ADAMIX_ARCH >= 750;
template <>
constexpr bool kHasFragments<bfloat16> = ADAMIX_ARCH == 0 || ADAMIX_ARCH >= 800;

// The same of a device, by the code that runs there (10 * compute capability); 0: none.
template <typename T>
constexpr int kFragmentsFrom = 0;
template <>
constexpr int kFragmentsFrom<half> = 75;
template <>
constexpr int kFragmentsFrom<bfloat16> = 80;

template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<half> = true;

// Columns of a row that four lanes hold, and the rows and ranks of one product.
constexpr int kFragmentCols = 32;
constexpr int kFragmentRows = 16;
constexpr int kFragmentRanks = 16;

// Eight elements of a row, two in a word, the first in the low half.
struct alignas(16) Words {
  uint32_t at[4];
};
struct alignas(8) TwoWords {
  uint32_t at[2];
};

}  // namespace adamix
