// Rows in memory, cut into pieces of 16 bytes where they lie: only a row's first and last piece are not whole.
#pragma once

#include "common/copy.h"
#include "consistency/pair_math.h"

namespace adamix {

// Pieces that a row of `classes` elements may touch, wherever it starts.
ADAMIX_BOTH constexpr int pieces_of(int classes, int piece_size) {
  return static_cast<int>((static_cast<int64_t>(classes) + 2 * (piece_size - 1)) / piece_size);
}

// Elements of a row's first piece that lie before the row.
template <typename T>
ADAMIX_DEVICE int head_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % Piece<T>::kSize);
}

// A row pair, cut as `a` lies. `b` may lie otherwise: then it is read element by element.
template <typename T>
struct PairRow {
  static constexpr int kSize = Piece<T>::kSize;

  const T* a;
  const T* b;
  int row, head, pieces, classes;
  bool live;  // there is such a row
  bool same;  // b lies as a does
  PairFlags flags;

  ADAMIX_DEVICE PairRow(const Rows<const T>& rows_a, const Rows<const T>& rows_b, const PairSums& sums, int row_,
                        int classes_)
      : a(rows_a.data), b(rows_b.data), row(row_), head(0), pieces(0), classes(classes_), live(row_ < sums.rows) {
    flags = flags_of(sums, row, classes);
    if (live) a += rows_a.offset(row), b += rows_b.offset(row);
    head = head_of(a);
    same = head == head_of(b);
    if (live) pieces = (head + classes + kSize - 1) / kSize;
  }

  // The row's column at the start of a piece; below 0 in the first one, where the row starts within it.
  ADAMIX_DEVICE int column(int piece) const { return piece * kSize - head; }
  ADAMIX_DEVICE bool whole(int piece) const { return column(piece) >= 0 && column(piece) + kSize <= classes; }
  ADAMIX_DEVICE int begin(int piece) const { return piece == 0 ? head : 0; }
  ADAMIX_DEVICE int end(int piece) const { return classes - column(piece) < kSize ? classes - column(piece) : kSize; }

  // -inf stands where the row does not.
  ADAMIX_DEVICE Piece<T> elements(const T* source, int piece) const {
    Piece<T> values;
    int col = column(piece);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      values.values[e] = col + e >= 0 && col + e < classes ? source[col + e] : from_float<T>(negative_infinity());
    }
    return values;
  }

  // Starts copies of a piece of both rows into shared memory.
  ADAMIX_DEVICE void copy(Piece<T>* to_a, Piece<T>* to_b, int piece) const {
    int col = column(piece);
    bool all = whole(piece);
    if (all) {
      copy_async(to_a, a + col);
    } else {
      *to_a = elements(a, piece);
    }
    if (all && same) {
      copy_async(to_b, b + col);
    } else {
      *to_b = elements(b, piece);
    }
  }

  ADAMIX_DEVICE void read(Piece<T>& from_a, Piece<T>& from_b, int piece) const {
    int col = column(piece);
    bool all = whole(piece);
    from_a = all ? *reinterpret_cast<const Piece<T>*>(a + col) : elements(a, piece);
    from_b = all && same ? *reinterpret_cast<const Piece<T>*>(b + col) : elements(b, piece);
  }

  // Writes a piece's columns to `target`, which may lie anyhow.
  ADAMIX_DEVICE void write(T* target, const Piece<T>& values, int piece) const {
    int col = column(piece);
    T* to = target + col;
    if (whole(piece) && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      *reinterpret_cast<Piece<T>*>(to) = values;
      return;
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      if (col + e >= 0 && col + e < classes) to[e] = values.values[e];
    }
  }

  ADAMIX_DEVICE void add(PairStatistics& s, const Piece<T>& from_a, const Piece<T>& from_b, int piece) const {
    float x[kSize], y[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) x[e] = to_float(from_a.values[e]), y[e] = to_float(from_b.values[e]);
    s.add(x, y, begin(piece), end(piece));
  }

  ADAMIX_DEVICE void add(PairMeans& means, const PairResult& result, const Piece<T>& from_a,
                         const Piece<T>& from_b) const {
#pragma unroll
    for (int e = 0; e < kSize; ++e) means.add(result, to_float(from_a.values[e]), to_float(from_b.values[e]));
  }

  // Gradients of a piece's columns in the place of its logits. rest: smoothing / classes.
  ADAMIX_DEVICE void slopes(Piece<T>& from_a, Piece<T>& from_b, int piece, const PairResult& result, float entropy,
                            float half, float smoothing, float rest, bool full) const {
    int label = flags.label - column(piece);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      float target = e == label ? 1.f - smoothing + rest : rest;
      PairSlope slope =
          slope_of(result, to_float(from_a.values[e]), to_float(from_b.values[e]), entropy, half, target, full);
      from_a.values[e] = from_float<T>(slope.a), from_b.values[e] = from_float<T>(slope.b);
    }
  }
};

// A row's place in a gradient, or null.
template <typename T>
ADAMIX_DEVICE T* place_of(const Rows<T>& rows, int row) {
  return rows.data == nullptr ? nullptr : rows.data + rows.offset(row);
}

template <typename T>
ADAMIX_DEVICE Piece<T> zeros() {
  Piece<T> piece;
#pragma unroll
  for (int e = 0; e < Piece<T>::kSize; ++e) piece.values[e] = from_float<T>(0.f);
  return piece;
}

}  // namespace adamix
