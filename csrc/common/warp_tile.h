// One warp's 16 x 16 tile of a matrix product, summed in fp32.
//
// fp16 and bf16 use the matrix units where the architecture has them for the type (fp16 from sm_70, bf16 from
// sm_80); everything else, and the CPU, multiplies in fp32. Operands lie in shared memory, 32-byte aligned, with
// pitches that are multiples of 16 bytes.
#pragma once

#include "common/dtype.h"

#if !defined(ADAMIX_HOST) && ADAMIX_ARCH >= 700
#include <mma.h>
#endif

namespace adamix {

// How the product's inner index k lies in an operand: contiguous, or across the rows.
enum class Inner { kContiguous, kStrided };

#if !defined(ADAMIX_HOST) && ADAMIX_ARCH >= 700

template <typename T>
struct HasMatrixUnit {
  static constexpr bool value = false;
};
template <>
struct HasMatrixUnit<half> {
  static constexpr bool value = true;
};
template <>
struct HasMatrixUnit<bfloat16> {
  static constexpr bool value = ADAMIX_ARCH >= 800;
};

template <typename T, bool MatrixUnit = HasMatrixUnit<T>::value>
class WarpTile;

template <typename T>
class WarpTile<T, true> {
 public:
  ADAMIX_DEVICE void zero() { nvcuda::wmma::fill_fragment(sum_, 0.f); }

  template <Inner A, Inner B, int Count>
  static ADAMIX_DEVICE void add_products(WarpTile (&tiles)[Count], const T* a, int a_pitch, const T* b, int b_pitch) {
    using namespace nvcuda::wmma;
    using ALayout = typename Choose<A == Inner::kContiguous, row_major, col_major>::type;
    using BLayout = typename Choose<B == Inner::kContiguous, col_major, row_major>::type;
    fragment<matrix_a, 16, 16, 16, T, ALayout> a_part;
    load_matrix_sync(a_part, a, a_pitch);
#pragma unroll
    for (int tile = 0; tile < Count; ++tile) {
      fragment<matrix_b, 16, 16, 16, T, BLayout> b_part;
      load_matrix_sync(b_part, b + tile * 16 * (B == Inner::kContiguous ? b_pitch : 1), b_pitch);
      mma_sync(tiles[tile].sum_, a_part, b_part, tiles[tile].sum_);
    }
  }

  ADAMIX_DEVICE void store(float* out, int pitch) const {
    nvcuda::wmma::store_matrix_sync(out, sum_, pitch, nvcuda::wmma::mem_row_major);
  }

 private:
  template <bool First, typename X, typename Y>
  struct Choose {
    using type = X;
  };
  template <typename X, typename Y>
  struct Choose<false, X, Y> {
    using type = Y;
  };

  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum_;
};

template <typename T>
class WarpTile<T, false> {
#else
template <typename T>
class WarpTile {
#endif
 public:
  ADAMIX_DEVICE void zero() {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum_[i] = 0.f;
  }

  // tiles[t][m][n] += over 16 k of A[m][k] B[k][16 t + n]: A at a[m * a_pitch + k] when contiguous,
  // a[k * a_pitch + m] when strided; B at b[n * b_pitch + k] or b[k * b_pitch + n]. All 32 lanes call.
  template <Inner A, Inner B, int Count>
  static ADAMIX_DEVICE void add_products(WarpTile (&tiles)[Count], const T* a, int a_pitch, const T* b, int b_pitch) {
    converge();
#if defined(ADAMIX_HOST)
    if (sizeof(T) == 2) {
      host::check_operand(a, a_pitch * sizeof(T));
      host::check_operand(b, b_pitch * sizeof(T));
    }
#endif
    for (int k = 0; k < 16; ++k) {
      float left = to_float(A == Inner::kContiguous ? a[row() * a_pitch + k] : a[k * a_pitch + row()]);
#pragma unroll
      for (int tile = 0; tile < Count; ++tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          int n = 16 * tile + col(i);
          float right = to_float(B == Inner::kContiguous ? b[n * b_pitch + k] : b[k * b_pitch + n]);
          tiles[tile].sum_[i] = fmaf(left, right, tiles[tile].sum_[i]);
        }
      }
    }
  }

  // out[m * pitch + n] = sum[m][n], in shared memory; other lanes may read it after a barrier.
  ADAMIX_DEVICE void store(float* out, int pitch) const {
    converge();
#pragma unroll
    for (int i = 0; i < 8; ++i) out[row() * pitch + col(i)] = sum_[i];
  }

 private:
  static ADAMIX_DEVICE int row() { return threadIdx.x % 32 / 2; }
  // Neighbouring lanes take neighbouring columns, so that a contiguous row is read without bank conflicts.
  static ADAMIX_DEVICE int col(int i) { return 2 * i + threadIdx.x % 2; }

  // The matrix units want all lanes of a warp; the CPU checks that they are there.
  static ADAMIX_DEVICE void converge() {
#if defined(ADAMIX_HOST)
    host::converge_warp();
#endif
  }

  float sum_[8];
};

}  // namespace adamix
