// The weighted means of many banks in one launch: every bank is read once, every result written once.
#include "common/piece.h"
#include "merge/merge.h"
#include "merge/shares.h"

namespace adamix {

// The last bank that starts at or before this block.
template <typename T>
ADAMIX_DEVICE int bank_of(const MergeBanks<T>& p, int block) {
  int low = 0, high = p.banks - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (p.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// This thread's elements at `start` of a chunk: neighbours of each other when aligned, of other threads' otherwise.
template <typename T, bool Aligned>
ADAMIX_DEVICE Piece<T> load_part(const T* from, int64_t start, int size) {
  if constexpr (Aligned) {
    return load_piece(from + start, Piece<T>::kSize, true);
  } else {
    Piece<T> piece;
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; ++e) {
      int64_t at = start + e * kMergeThreads;
      piece.values[e] = at < size ? from[at] : from_float<T>(0.f);
    }
    return piece;
  }
}

template <typename T, bool Aligned>
ADAMIX_DEVICE void store_part(T* to, const Piece<T>& piece, int64_t start, int size) {
  if constexpr (Aligned) {
    store_piece(to + start, piece, Piece<T>::kSize, true);
  } else {
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; ++e) {
      int64_t at = start + e * kMergeThreads;
      if (at < size) to[at] = piece.values[e];
    }
  }
}

template <typename T, typename Wide, bool Aligned>
ADAMIX_DEVICE void merge_chunk(const T* bank, T* out, const Wide* shares, Wide total, int experts, int size,
                               int64_t start) {
  if (start >= size) return;
  Wide sums[Piece<T>::kSize];
#pragma unroll 4
  for (int m = 0; m < experts; ++m) {
    Wide share = shares == nullptr ? Wide(1) : shares[m];
    Piece<T> piece = load_part<T, Aligned>(bank + static_cast<int64_t>(m) * size, start, size);
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; ++e) {
      Wide value = to_float(piece.values[e]);
      sums[e] = m == 0 ? value * share : multiply_add(value, share, sums[e]);
    }
  }
  Piece<T> piece;
#pragma unroll
  for (int e = 0; e < Piece<T>::kSize; ++e) piece.values[e] = from_float<T>(static_cast<float>(sums[e] / total));
  store_part<T, Aligned>(out, piece, start, size);
}

template <typename T, typename Wide>
__global__ void __launch_bounds__(kMergeThreads, 16 / sizeof(Wide)) merge_banks_kernel(MergeBanks<T> p) {
  SharedMemory memory;
  MergeShares<Wide> shares(memory, p.most_experts);
  int n = bank_of(p, blockIdx.x);
  int experts = p.experts[n], size = p.size[n];
  Wide total = shares.fill(p.scores[n], p.scored[n], experts);
  const Wide* each = p.scored[n] == Kind::kNone ? nullptr : shares.values;
  int64_t chunk = static_cast<int64_t>(blockIdx.x - p.first_block[n]) * kMergeThreads * Piece<T>::kSize;
  if (p.aligned[n]) {
    int64_t start = chunk + threadIdx.x * Piece<T>::kSize;
    merge_chunk<T, Wide, true>(p.bank[n], p.out[n], each, total, experts, size, start);
  } else {
    merge_chunk<T, Wide, false>(p.bank[n], p.out[n], each, total, experts, size, chunk + threadIdx.x);
  }
}

#define ADAMIX_INSTANTIATE(T)                                           \
  template __global__ void merge_banks_kernel<T, float>(MergeBanks<T>); \
  template __global__ void merge_banks_kernel<T, double>(MergeBanks<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_merge_banks(const MergeBanks<T>& params, int blocks, bool wide, const Device& device) {
  size_t bytes = wide ? shared_bytes<MergeShares<double>>(params.most_experts)
                      : shared_bytes<MergeShares<float>>(params.most_experts);
  Shape shape{dim3(static_cast<unsigned>(blocks)), kMergeThreads, bytes};
  launch("merge_banks", wide ? merge_banks_kernel<T, double> : merge_banks_kernel<T, float>, shape, device, params);
}

template void launch_merge_banks(const MergeBanks<float>&, int, bool, const Device&);
template void launch_merge_banks(const MergeBanks<half>&, int, bool, const Device&);
template void launch_merge_banks(const MergeBanks<bfloat16>&, int, bool, const Device&);
#endif

}  // namespace adamix
