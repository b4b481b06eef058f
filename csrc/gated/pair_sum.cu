// out = base + the results of a row's pairs, in the order of its slots: a thread has 16 bytes of some rows.
#include "common/words.h"
#include "gated/sorted.h"

namespace adamix {

constexpr int kPairSumThreads = 128, kPairSumRows = 4;

template <typename T>
ADAMIX_DEVICE void add_piece(float (&sums)[8], uint4 of) {
  sums[0] += low_of<T>(of.x), sums[1] += high_of<T>(of.x), sums[2] += low_of<T>(of.y), sums[3] += high_of<T>(of.y);
  sums[4] += low_of<T>(of.z), sums[5] += high_of<T>(of.z), sums[6] += low_of<T>(of.w), sums[7] += high_of<T>(of.w);
}

template <typename T>
__global__ void __launch_bounds__(kPairSumThreads) gated_pair_sum_kernel(PairSum<T> p) {
  if constexpr (kHasFragments<T>) {
    int first = blockIdx.x * kPairSumRows, inner = p.ranges.groups * p.ranges.cols;
    int count = p.rows - first < kPairSumRows ? static_cast<int>(p.rows - first) : kPairSumRows;
    int64_t pitch = static_cast<int64_t>(p.slots) * inner;
    for (int piece = threadIdx.x; 8 * piece < p.width; piece += kPairSumThreads) {
      int col = 8 * piece, from = -1;
      for (int group = 0; group < p.ranges.groups; ++group) {
        int at = col - p.ranges.start[group];
        if (at >= 0 && at < p.ranges.cols) from = group * p.ranges.cols + at;
      }
      int slots = from < 0 ? 0 : p.slots;
      const T* of_row = p.y + first * pitch + (from < 0 ? 0 : from);
      T* to = p.out + static_cast<int64_t>(first) * p.width + col;
#pragma unroll 2
      for (int i = 0; i < count; ++i, of_row += pitch, to += p.width) {
        float sums[8] = {};
        if (p.base.data != nullptr) add_piece<T>(sums, load_words<uint4>(p.base.data + p.base.offset(first + i) + col));
        const T* one = of_row;
#pragma unroll 2
        for (int slot = 0; slot < slots; ++slot, one += inner) add_piece<T>(sums, load_words<uint4>(one));
        uint4 result{word_of<T>(sums[0], sums[1]), word_of<T>(sums[2], sums[3]), word_of<T>(sums[4], sums[5]),
                     word_of<T>(sums[6], sums[7])};
        store_piece_at(to, 0, result);
      }
    }
  }
}

template __global__ void gated_pair_sum_kernel<half>(PairSum<half>);
template __global__ void gated_pair_sum_kernel<bfloat16>(PairSum<bfloat16>);

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_pair_sum(const PairSum<T>& params, const Device& device) {
  dim3 grid(static_cast<unsigned>((params.rows + kPairSumRows - 1) / kPairSumRows));
  launch("gated_pair_sum", gated_pair_sum_kernel<T>, {grid, kPairSumThreads, 0}, device, params);
}

template void launch_pair_sum(const PairSum<half>&, const Device&);
template void launch_pair_sum(const PairSum<bfloat16>&, const Device&);
#endif

}  // namespace adamix
