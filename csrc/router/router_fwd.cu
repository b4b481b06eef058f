// A block has 16 rows of x, which it reads once; its warps share the features, so that a single row is spread as well.
#include "common/fragments.h"
#include "common/piece.h"
#include "common/shared_memory.h"
#include "common/warp.h"
#include "router/choice.h"

namespace adamix {

constexpr int kRouterThreads = 32 * kRouterWarps;

// Columns `col` and on of the row `row` of x, or of the weight rounded to x's type; zeros outside.
template <typename T>
ADAMIX_DEVICE Piece<T> x_piece(const Router<T>& p, int64_t row, int col) {
  int valid = row < p.rows ? p.features - col : 0;
  return load_piece(p.x + row * p.features + col, valid, p.aligned);
}
template <typename T>
ADAMIX_DEVICE Piece<T> weight_piece(const Router<T>& p, int expert, int col) {
  int valid = expert < p.experts ? p.features - col : 0;
  int64_t at = static_cast<int64_t>(expert) * p.features + col;
  if constexpr (sizeof(T) == 2) {
    if (p.wide) {
      Piece<T> piece;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Piece<float> part =
            load_piece(static_cast<const float*>(p.weight) + at + 4 * half, valid - 4 * half, p.aligned);
#pragma unroll
        for (int e = 0; e < 4; ++e) piece.values[4 * half + e] = from_float<T>(part.values[e]);
      }
      return piece;
    }
  }
  return load_piece(static_cast<const T*>(p.weight) + at, valid, p.aligned);
}

template <typename T>
ADAMIX_DEVICE Words words_of(const Piece<T>& piece) {
  union Both {
    Piece<T> piece;
    Words words;
    ADAMIX_DEVICE explicit Both(const Piece<T>& given) : piece(given) {}
  } both(piece);
  return both.words;
}

// part[16, 8 * Tiles] = this warp's columns of x W^T, from `expert` on, on matrix units.
template <typename T, int Tiles>
ADAMIX_DEVICE void matrix_part(const Router<T>& p, int64_t first, int expert, float* part) {
  float sums[Tiles][4] = {};
  int row = fragment_row(), warp = threadIdx.x / 32;
#pragma unroll 2
  for (int start = warp * kFragmentCols; start < p.features; start += kRouterWarps * kFragmentCols) {
    int col = start + 8 * fragment_part();
    Words low = words_of(x_piece(p, first + row, col)), high = words_of(x_piece(p, first + row + 8, col));
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      Words w = words_of(weight_piece(p, expert + 8 * tile + row, col));
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        multiply<T>(sums[tile], low.at[k], high.at[k], low.at[k + 1], high.at[k + 1], w.at[k], w.at[k + 1]);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
    for (int out = 0; out < 4; ++out) {
      part[(row + out / 2 * 8) * 8 * Tiles + 8 * tile + 2 * fragment_part() + out % 2] = sums[tile][out];
    }
  }
}

// The same in fp32: four rows and eight experts at a time, each lane every 32nd piece of the warp's columns.
template <typename T, int Tiles>
ADAMIX_DEVICE void plain_part(const Router<T>& p, int64_t first, int expert, float* part) {
  constexpr int kRows = 4, kSize = Piece<T>::kSize;
  int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int at = 0; at < Tiles * kRouterRows / kRows; ++at) {
    int row = at % (kRouterRows / kRows) * kRows, tile = at / (kRouterRows / kRows);
    float sums[32] = {};
#pragma unroll 1
    for (int col = threadIdx.x * kSize; col < p.features; col += kRouterThreads * kSize) {
      Piece<T> x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) x[r] = x_piece(p, first + row + r, col);
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        Piece<T> w = weight_piece(p, expert + 8 * tile + m, col);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
            sums[8 * r + m] = fmaf(to_float(x[r].values[e]), to_float(w.values[e]), sums[8 * r + m]);
          }
        }
      }
    }
    // Lane l is left with the warp's sum l.
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
      bool upper = (lane & half) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        float mine = upper ? sums[i + half] : sums[i], other = upper ? sums[i] : sums[i + half];
        sums[i] = mine + shuffle_xor(other, half);
      }
    }
    part[(row + lane / 8) * 8 * Tiles + 8 * tile + lane % 8] = sums[0];
  }
}

// gates of one row of logits, by one warp.
template <typename T>
ADAMIX_DEVICE void gates_of_row(const Router<T>& p, const float* logits, float* best, int64_t row) {
  int lane = threadIdx.x % 32;
  if (p.top_k == 0) {
    float top = logits[0];
    for (int m = lane; m < p.experts; m += 32) top = Max{}(top, logits[m]);
    top = warp_reduce(top, Max{});
    float total = 0.f;
    for (int m = lane; m < p.experts; m += 32) total += expf(logits[m] - top);
    total = warp_reduce(total, Add{});
    for (int m = lane; m < p.experts; m += 32) p.gates[row * p.experts + m] = expf(logits[m] - top) / total;
    return;
  }
  uint32_t taken = 0;
  for (int slot = 0; slot < p.top_k; ++slot) {
    Ranked mine{-infinity(), kRouterMostExperts};
    for (int m = lane, bit = 0; m < p.experts; m += 32, ++bit) {
      float rank = logits[m] != logits[m] ? infinity() : logits[m];
      if ((taken >> bit & 1u) == 0) mine = Larger{}(mine, Ranked{rank, m});
    }
    int id = warp_reduce(mine, Larger{}).id;
    if (lane == id % 32) taken |= 1u << id / 32;
    if (lane == slot % 32) {
      best[slot] = logits[id];
      p.index[row * p.top_k + slot] = id;
    }
  }
  __syncwarp();
  float top = best[0], total = 0.f;
  for (int slot = lane; slot < p.top_k; slot += 32) total += expf(best[slot] - top);
  total = warp_reduce(total, Add{});
  for (int slot = lane; slot < p.top_k; slot += 32) p.gates[row * p.top_k + slot] = expf(best[slot] - top) / total;
}

template <typename T, int Tiles>
__global__ void __launch_bounds__(kRouterThreads) router_forward_kernel(Router<T> p) {
  constexpr int kCols = 8 * Tiles, kPart = kRouterRows * kCols;
  SharedMemory memory;
  RouterShared shared(memory, Tiles, p.experts, p.top_k);
  int64_t first = static_cast<int64_t>(blockIdx.x) * kRouterRows;
  int warp = threadIdx.x / 32;
  for (int expert = 0; expert < p.experts; expert += kCols) {
    if constexpr (kHasFragments<T>) {
      matrix_part<T, Tiles>(p, first, expert, shared.parts + warp * kPart);
    } else {
      plain_part<T, Tiles>(p, first, expert, shared.parts + warp * kPart);
    }
    __syncthreads();
    for (int at = threadIdx.x; at < kPart; at += kRouterThreads) {
      int row = at / kCols, m = expert + at % kCols;
      if (m >= p.experts) continue;
      float sum = shared.parts[at];
#pragma unroll
      for (int other = 1; other < kRouterWarps; ++other) sum += shared.parts[other * kPart + at];
      if (p.bias != nullptr) {
        float bias = p.wide ? static_cast<const float*>(p.bias)[m] : to_float(static_cast<const T*>(p.bias)[m]);
        sum += to_float(from_float<T>(bias));
      }
      shared.logits[row * p.experts + m] = sum;
      if (first + row < p.rows) p.logits[(first + row) * p.experts + m] = sum;
    }
    __syncthreads();
  }
  for (int row = warp; row < kRouterRows && first + row < p.rows; row += kRouterWarps) {
    gates_of_row(p, shared.logits + row * p.experts, shared.best + row * p.top_k, first + row);
  }
}

#define ADAMIX_INSTANTIATE(T)                                      \
  template __global__ void router_forward_kernel<T, 1>(Router<T>); \
  template __global__ void router_forward_kernel<T, 4>(Router<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_router(const Router<T>& params, const Device& device) {
  int tiles = params.experts <= 8 ? 1 : 4;
  Shape shape{dim3(static_cast<unsigned>(params.blocks())), kRouterThreads,
              shared_bytes<RouterShared>(tiles, params.experts, params.top_k)};
  launch("router_forward", tiles == 1 ? router_forward_kernel<T, 1> : router_forward_kernel<T, 4>, shape, device,
         params);
}

template void launch_router(const Router<float>&, const Device&);
template void launch_router(const Router<half>&, const Device&);
template void launch_router(const Router<bfloat16>&, const Device&);
#endif

}  // namespace adamix
