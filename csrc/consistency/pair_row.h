// Rows in memory, cut into pieces of 16 bytes where they lie: only a row's first and last piece are not whole.
#pragma once

#include "common/copy.h"
#include "common/warp.h"
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

// Some pieces of a row, counted from the first of them: `end` there are, those in [low, high) are whole; low is 0 or 1.
struct PairSpan {
  int low, high, end;
};

// Pieces that a thread has under way: registers hold no more without asynchronous copies.
constexpr int kPiecesATurn = ADAMIX_ARCH >= 800 ? 2 : 1;

// whole(i) and then behind(i) for the whole pieces of a span that are `lane`'s, between(), then edge(i) for its others.
// Those of both spans alone are whole, and of the larger one none is left out.
template <typename Whole, typename Behind, typename Between, typename Edge>
ADAMIX_DEVICE void walk(PairSpan span, int lane, int threads, Whole whole, Behind behind, Between between, Edge edge) {
  int at = lane < span.low ? lane + threads : lane;
  if constexpr (kPiecesATurn == 2) {
    // So that no number of turns has to be found.
#pragma unroll 1
    for (; at < span.high - threads; at += 2 * threads) {
      whole(at), whole(at + threads);
      behind(at), behind(at + threads);
    }
    if (at < span.high) whole(at), behind(at), at += threads;
  } else {
#pragma unroll 1
    for (; at < span.high; at += threads) whole(at), behind(at);
  }
  between();
  for (int i = lane < span.low ? lane : at; i < span.end; i = i < span.low ? at : i + threads) edge(i);
}

template <typename Whole, typename Between, typename Edge>
ADAMIX_DEVICE void walk(PairSpan span, int lane, int threads, Whole whole, Between between, Edge edge) {
  walk(span, lane, threads, whole, [](int) {}, between, edge);
}

ADAMIX_DEVICE PairSpan both_of(PairSpan first, PairSpan second) {
  return {first.low > second.low ? first.low : second.low, first.high < second.high ? first.high : second.high,
          first.end > second.end ? first.end : second.end};
}

// A row pair, cut as `a` lies. `b` may lie otherwise.
template <typename T>
struct PairRow {
  static constexpr int kSize = Piece<T>::kSize;

  const T* a;
  const T* b;
  int row, head, pieces, classes;
  int label;  // where its label's column lies, from the start of its first piece on; -1: it needs none
  bool live;  // there is such a row
  bool same;  // b lies as a does
  PairFlags flags;

  ADAMIX_DEVICE PairRow(const Rows<const T>& rows_a, const Rows<const T>& rows_b, const PairSums& sums, int row_,
                        int classes_)
      : a(rows_a.data),
        b(rows_b.data),
        row(row_),
        head(0),
        pieces(0),
        classes(classes_),
        label(-1),
        live(row_ < sums.rows) {
    flags = flags_of(sums, row, classes);
    if (live) a += row_offset(rows_a, row), b += row_offset(rows_b, row);
    head = head_of(a);
    same = head == head_of(b);
    if (flags.counted && flags.label >= 0) label = head + flags.label;
    if (live) pieces = (head + classes + kSize - 1) / kSize;
  }

  // The row's column at the start of a piece; below 0 in the first one, where the row starts within it.
  ADAMIX_DEVICE int column(int piece) const { return piece * kSize - head; }
  ADAMIX_DEVICE bool whole(int piece) const { return column(piece) >= 0 && column(piece) + kSize <= classes; }
  ADAMIX_DEVICE int begin(int piece) const { return piece == 0 ? head : 0; }
  ADAMIX_DEVICE int end(int piece) const { return classes - column(piece) < kSize ? classes - column(piece) : kSize; }

  // Of its pieces from `first` on, at most `count`.
  ADAMIX_DEVICE PairSpan span(int first, int count) const {
    int behind = pieces - first < count ? pieces - first : count;
    int whole = (head + classes) / kSize - first;
    return {first == 0 && head > 0 ? 1 : 0, whole < behind ? whole : behind, behind};
  }

  // A whole piece of b. Both aligned ones that it touches lie within the row but at its ends.
  ADAMIX_DEVICE Piece<T> whole_b(int col) const {
    if (same) return *reinterpret_cast<const Piece<T>*>(b + col);
    bool inside = col >= kSize && col + 2 * kSize <= classes;
    return inside ? load_across(b + col) : load_elements(b, col, classes);
  }

  // Starts copies of a piece of both rows into shared memory.
  ADAMIX_DEVICE void copy(Piece<T>* to_a, Piece<T>* to_b, int piece) const {
    int col = column(piece);
    bool all = whole(piece);
    if (all) {
      copy_async(to_a, a + col);
    } else {
      *to_a = load_elements(a, col, classes);
    }
    if (all && same) {
      copy_async(to_b, b + col);
    } else {
      *to_b = all ? whole_b(col) : load_elements(b, col, classes);
    }
  }

  ADAMIX_DEVICE void read_whole(Piece<T>& from_a, Piece<T>& from_b, int piece) const {
    int col = column(piece);
    from_a = *reinterpret_cast<const Piece<T>*>(a + col), from_b = whole_b(col);
  }
  ADAMIX_DEVICE void read(Piece<T>& from_a, Piece<T>& from_b, int piece) const {
    if (whole(piece)) return read_whole(from_a, from_b, piece);
    from_a = load_elements(a, column(piece), classes), from_b = load_elements(b, column(piece), classes);
  }

  // Whether `target`, a row of a gradient, lies as a does.
  ADAMIX_DEVICE bool fits(const T* target) const { return head_of(target) == head; }

  // Those of a piece's elements that lie within the row.
  ADAMIX_DEVICE void write_elements(T* target, const Piece<T>& values, int piece) const {
    store_elements(target, values, column(piece), classes);
  }

  // A warp's pieces, lane by lane neighbours, to a target that may lie otherwise: a lane stores the 16 bytes that its
  // piece shares with the one before. All lanes call, with one row; `have`: this lane has a piece.
  ADAMIX_DEVICE void write_across(T* target, const Piece<T>& values, int piece, bool have) const {
    int lane = threadIdx.x % 32, col = column(piece), over = head_of(target + col);
    int mine = have && whole(piece) ? 1 : 0;
    Piece<T> previous = shuffle_from(values, (lane + 31) % 32);
    int joined = shuffle_from(mine, (lane + 31) % 32) & mine;
    if (lane == 0) joined = 0;
    int taken = shuffle_from(joined, (lane + 1) % 32);
    __syncwarp();  // what a lane has read another may overwrite
    if (!have) return;
    if (mine != 0 && over == 0) {
      *reinterpret_cast<Piece<T>*>(target + col) = values;
      return;
    }
    if (joined != 0) {
      *reinterpret_cast<Piece<T>*>(target + col - over) =
          across(previous, values, (kSize - over) * static_cast<int>(sizeof(T)));
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      int stored = e < kSize - over ? joined : taken;
      if (stored == 0 && col + e >= 0 && col + e < classes) target[col + e] = values.values[e];
    }
  }

  // The same, piece by piece where a warp has several rows.
  ADAMIX_DEVICE void write(T* target, const Piece<T>& values, int piece, bool have, bool across) const {
    if (across) return write_across(target, values, piece, have);
    if (!have) return;
    T* to = target + column(piece);
    if (whole(piece) && head_of(to) == 0) {
      *reinterpret_cast<Piece<T>*>(to) = values;
    } else {
      write_elements(target, values, piece);
    }
  }
};

// A row's place in a gradient, or null.
template <typename T>
ADAMIX_DEVICE T* place_of(const Rows<T>& rows, int row) {
  return rows.data == nullptr ? nullptr : rows.data + row_offset(rows, row);
}

}  // namespace adamix
