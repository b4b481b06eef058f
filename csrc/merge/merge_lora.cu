// LoRA factors of any dtype, or their means, folded into a weight: it is read once and written once, in one rounding.
#include "common/piece.h"
#include "merge/merge.h"
#include "merge/shares.h"

namespace adamix {

constexpr int kLoraRank = 16;                    // ranks at a time
constexpr int kThreadRows = 4, kThreadCols = 8;  // a thread's part of the tile
constexpr int kThreadsAcross = kLoraCols / kThreadCols;
static_assert(kLoraRows / kThreadRows * kThreadsAcross == kMergeThreads, "one part of the tile a thread");

// Both factors' parts of a tile, the lines of one rank side by side.
template <typename Wide>
struct LoraTile {
  static constexpr int kLeftPitch = kLoraRows + 4, kRightPitch = kLoraCols + 16;
  Wide* left;   // [kLoraRank, kLoraRows]: B of the rows' outputs, or A of the rows' inputs
  Wide* right;  // [kLoraRank, kLoraCols]

  template <typename Memory>
  ADAMIX_BOTH explicit LoraTile(Memory& memory) {
    left = memory.template take<Wide>(kLoraRank * kLeftPitch);
    right = memory.template take<Wide>(kLoraRank * kRightPitch);
  }
};

// The columns of a thread's piece are neighbours in the weight; in the tile those of one load of 16 bytes are, so that
// a warp's loads do not meet in a bank.
template <typename T>
ADAMIX_DEVICE int first_col(int piece) {
  constexpr int kSize = Piece<T>::kSize;
  return piece * kThreadsAcross * kSize + threadIdx.x % kThreadsAcross * kSize;
}
template <typename T>
ADAMIX_DEVICE int place_of(int col) {
  if constexpr (Piece<T>::kSize == 8) {
    return col % 8 / 4 * (kLoraCols / 2 + 16) + col / 8 * 4 + col % 4;
  } else {
    return col;
  }
}

template <typename Wide>
struct alignas(16) Four {
  Wide values[4];
};

// Elements at .. at + 3 of every expert of the factor at `data`, summed; the first `valid`, then zeros.
template <typename Wide, typename T>
ADAMIX_DEVICE Four<Wide> sum_of_four(const LoraFactor& factor, const void* data, int64_t at, int valid) {
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Together {
    T values[4];
  };
  Four<Wide> sum{};
  const T* from = static_cast<const T*>(data) + at;
  for (int m = 0; m < factor.experts; ++m, from += factor.stride) {
    Together four;
    if (factor.by_four && valid > 0) {
      four = *reinterpret_cast<const Together*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) four.values[e] = e < valid ? from[e] : T{};
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Wide value;
      if constexpr (sizeof(T) == 8) {
        value = four.values[e];
      } else {
        value = to_float(four.values[e]);
      }
      sum.values[e] = m == 0 ? value : sum.values[e] + value;
    }
  }
  return sum;
}

template <typename Wide>
ADAMIX_DEVICE Four<Wide> mean_of_four(const LoraFactor& factor, const void* data, Kind kind, int64_t at, int valid) {
  Four<Wide> mean;
  if constexpr (sizeof(Wide) == 8) {
    mean = sum_of_four<Wide, double>(factor, data, at, valid);
  } else if (kind == Kind::kFloat) {
    mean = sum_of_four<Wide, float>(factor, data, at, valid);
  } else if (kind == Kind::kHalf) {
    mean = sum_of_four<Wide, half>(factor, data, at, valid);
  } else {
    mean = sum_of_four<Wide, bfloat16>(factor, data, at, valid);
  }
  if (factor.experts > 1) {
#pragma unroll
    for (int e = 0; e < 4; ++e) mean.values[e] /= Wide(factor.experts);
  }
  return mean;
}

// tile[rank][place(line)] = mean(A_g)[rank0 + rank][line0 + line] for Lines inputs; 0 outside.
template <int Lines, typename T, typename Wide, typename Place>
ADAMIX_DEVICE void load_a(Wide* tile, int pitch, const MergeLora<T>& p, int group, int line0, int rank0, Place place) {
  for (int i = threadIdx.x; i < kLoraRank * Lines / 4; i += kMergeThreads) {
    int rank = i / (Lines / 4), line = i % (Lines / 4) * 4;
    int64_t row = static_cast<int64_t>(p.first_group + group) * p.rank + rank0 + rank;
    int valid = rank0 + rank < p.rank ? p.features - line0 - line : 0;
    Four<Wide> mean = mean_of_four<Wide>(p.a, p.a.data[blockIdx.y], p.kind, row * p.features + line0 + line, valid);
#pragma unroll
    for (int e = 0; e < 4; ++e) tile[rank * pitch + place(line) + e] = mean.values[e];
  }
}

// tile[rank][place(line)] = mean(B_g)[output0 + line][rank0 + rank], outputs counted in the group; 0 outside.
template <int Lines, typename T, typename Wide, typename Place>
ADAMIX_DEVICE void load_b(Wide* tile, int pitch, const MergeLora<T>& p, int group, int output0, int rank0,
                          Place place) {
  for (int i = threadIdx.x; i < kLoraRank * Lines / 4; i += kMergeThreads) {
    // A warp's stores go to neighbouring lines.
    int line = i % Lines, rank = i / Lines * 4, output = output0 + line;
    int64_t row = static_cast<int64_t>(p.first_group + group) * p.per_group + output;
    int valid = output >= 0 && output < p.per_group ? p.rank - rank0 - rank : 0;
    Four<Wide> mean = mean_of_four<Wide>(p.b, p.b.data[blockIdx.y], p.kind, row * p.rank + rank0 + rank, valid);
#pragma unroll
    for (int e = 0; e < 4; ++e) tile[(rank + e) * pitch + place(line)] = mean.values[e];
  }
}

template <typename T, typename Wide>
__global__ void __launch_bounds__(kMergeThreads, 16 / sizeof(Wide) / 2) merge_lora_kernel(MergeLora<T> p) {
  constexpr int kSize = Piece<T>::kSize, kPieces = kThreadCols / kSize;
  using Tile = LoraTile<Wide>;
  SharedMemory memory;
  Tile tile(memory);
  int tiles = (p.width + kLoraCols - 1) / kLoraCols;
  int row0 = blockIdx.x / tiles * kLoraRows, col0 = blockIdx.x % tiles * kLoraCols;
  int thread_row = threadIdx.x / kThreadsAcross * kThreadRows, row = row0 + thread_row;
  const T* weight = p.weight[blockIdx.y];
  T* out = p.out[blockIdx.y];
  auto by_line = [](int line) { return line; };
  auto by_piece = [](int line) { return place_of<T>(line); };

  Piece<T> values[kThreadRows][kPieces];
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      int col = col0 + first_col<T>(piece);
      if (row + i >= p.height || col >= p.width) continue;
      values[i][piece] = load_piece(weight + static_cast<int64_t>(row + i) * p.width + col, p.width - col, p.aligned);
    }
  }
  for (int group = 0; group < p.here; ++group) {
    if (!p.touches(group, row0, col0)) continue;
    Wide sums[kThreadRows][kThreadCols] = {};
    for (int rank0 = 0; rank0 < p.rank; rank0 += kLoraRank) {
      __syncthreads();
      if (p.fan_in_fan_out) {
        load_a<kLoraRows>(tile.left, Tile::kLeftPitch, p, group, row0, rank0, by_line);
        load_b<kLoraCols>(tile.right, Tile::kRightPitch, p, group, col0 - p.offsets[group], rank0, by_piece);
      } else {
        load_b<kLoraRows>(tile.left, Tile::kLeftPitch, p, group, row0 - p.offsets[group], rank0, by_line);
        load_a<kLoraCols>(tile.right, Tile::kRightPitch, p, group, col0, rank0, by_piece);
      }
      __syncthreads();
#pragma unroll 2
      for (int c = 0; c < kLoraRank; ++c) {
        Four<Wide> left = *reinterpret_cast<const Four<Wide>*>(tile.left + c * Tile::kLeftPitch + thread_row);
#pragma unroll
        for (int four = 0; four < kThreadCols / 4; ++four) {
          int place = place_of<T>(first_col<T>(four * 4 / kSize) + four * 4 % kSize);
          Four<Wide> right = *reinterpret_cast<const Four<Wide>*>(tile.right + c * Tile::kRightPitch + place);
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              sums[i][four * 4 + e] = multiply_add(left.values[i], right.values[e], sums[i][four * 4 + e]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int e = 0; e < kThreadCols; ++e) {
        T& value = values[i][e / kSize].values[e % kSize];
        int output = (p.fan_in_fan_out ? col0 + first_col<T>(e / kSize) + e % kSize : row + i) - p.offsets[group];
        Wide sum = multiply_add(Wide(p.scaling), sums[i][e], Wide(to_float(value)));
        // What the group does not touch keeps its bits.
        if (output >= 0 && output < p.per_group) value = from_float<T>(static_cast<float>(sum));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      int col = col0 + first_col<T>(piece);
      if (row + i >= p.height || col >= p.width) continue;
      T* to = out + static_cast<int64_t>(row + i) * p.width + col;
      store_piece(to, values[i][piece], p.width - col, p.aligned);
    }
  }
}

#define ADAMIX_INSTANTIATE(T)                                         \
  template __global__ void merge_lora_kernel<T, float>(MergeLora<T>); \
  template __global__ void merge_lora_kernel<T, double>(MergeLora<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_merge_lora(const MergeLora<T>& params, bool wide, const Device& device) {
  Shape shape{params.blocks(), kMergeThreads,
              wide ? shared_bytes<LoraTile<double>>() : shared_bytes<LoraTile<float>>()};
  launch("merge_lora", wide ? merge_lora_kernel<T, double> : merge_lora_kernel<T, float>, shape, device, params);
}

template void launch_merge_lora(const MergeLora<float>&, bool, const Device&);
template void launch_merge_lora(const MergeLora<half>&, bool, const Device&);
template void launch_merge_lora(const MergeLora<bfloat16>&, bool, const Device&);
#endif

}  // namespace adamix
