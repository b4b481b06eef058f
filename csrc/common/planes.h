// Gradients that several blocks sum: each share of the rows has an fp32 plane, and a last launch adds the planes in
// their order. Where one block sums all rows there are no planes, and the block writes the gradient itself.
#pragma once

#include "common/dtype.h"
#include "common/launch.h"

namespace adamix {

// One gradient, and where its sums begin in a plane: at a multiple of 4 floats.
template <typename T>
struct Grad {
  T* out;
  int64_t begin;
  int64_t size;
};

// How the rows are shared out.
struct RowShares {
  float* planes;  // [count, plane_size], or null when count is 1
  int64_t plane_size;
  int64_t rows;
  int64_t rows_a_share;
  int count;
};

// grad[at] = value, in the plane where there is one.
template <typename T>
ADAMIX_DEVICE void store_grad(const Grad<T>& grad, float* plane, int64_t at, float value) {
  if (plane != nullptr) {
    plane[grad.begin + at] = value;
  } else {
    grad.out[at] = from_float<T>(value);
  }
}

constexpr int kMaxGrads = 4;

template <typename T>
struct PlaneSum {
  const float* planes;
  int64_t plane_size;
  int shares;
  int grads;
  Grad<T> grad[kMaxGrads];

  // A gradient whose place in a plane is behind those added before.
  ADAMIX_BOTH Grad<T> add(T* out, int64_t size) {
    grad[grads] = {out, plane_size, size};
    plane_size += (size + 3) / 4 * 4;
    return grad[grads++];
  }
};

#if defined(ADAMIX_LAUNCHERS)
// As many shares as fill the device when one expert of each side serves every row, which makes `blocks` blocks; but
// no share below 128 rows, and planes cost at most a quarter of the traffic of what they sum: row_bytes a row.
inline int count_shares(int64_t rows, int64_t blocks, int64_t row_bytes, int64_t plane_size, const Device& device) {
  auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  if (blocks == 0 || plane_size == 0) return 1;
  int64_t filling = (4 * device.multiprocessors + blocks - 1) / blocks;
  int64_t plane_bytes = 2 * static_cast<int64_t>(sizeof(float)) * plane_size;  // written and read
  int64_t shares = least(least(filling, rows / 128), rows * row_bytes / (4 * plane_bytes));
  return shares < 1 ? 1 : static_cast<int>(shares);
}

// Every gradient = the sum of its planes, in their order.
template <typename T>
void launch_plane_sum(const char* name, const PlaneSum<T>& params, const Device& device);

// One of the library's kernels: where it loads, the others do.
const void* any_kernel();
#endif

}  // namespace adamix
