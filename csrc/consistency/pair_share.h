// A thread's share of a row pair: the pieces that it holds in shared memory, and those of the tail, which lies behind
// all that is held and is read where it lies.
#pragma once

#include "consistency/pair_row.h"

namespace adamix {

// bfloat16 is converted by integers on old GPUs, which leaves no registers.
template <typename T>
constexpr bool kLoadsAhead = ADAMIX_ARCH > 0 && ADAMIX_ARCH < 800;
template <>
constexpr bool kLoadsAhead<bfloat16> = false;

// A copy of 16 bytes into the place of what its thread uses between both calls. Without asynchronous copies the load is
// under way meanwhile; with them the copy starts when the place is free.
template <typename T>
class CopyAhead {
 public:
  ADAMIX_DEVICE void start(const void* global) {
    from_ = global;
    if constexpr (kLoadsAhead<T>) value_ = *static_cast<const uint4*>(global);
  }
  ADAMIX_DEVICE void finish(void* shared) const {
    if constexpr (kLoadsAhead<T>) {
      *static_cast<uint4*>(shared) = value_;
    } else {
      copy_async(shared, from_);
    }
  }

 private:
  const void* from_ = nullptr;
  uint4 value_{};
};

template <typename T, int Lanes>
struct PairShare {
  static constexpr int kSize = Piece<T>::kSize;
  static constexpr bool kAcross = Lanes == 0 || Lanes == 32;  // a warp has one row

  Piece<T>*a, *b;       // [held]
  int lane, threads;    // of the row, in this block
  int first, held;      // of the row's pieces, this block's
  PairSpan span, tail;  // of an unselected row, nothing

  ADAMIX_DEVICE void take(const PairRow<T>& row, bool tails) {
    span = tail = {0, 0, 0};
    if (!row.flags.selected) return;
    span = row.span(first, held);
    if (tails) tail = row.span(held, row.pieces);
  }

  // All of a row's pieces that the block can hold.
  ADAMIX_DEVICE void copy(const PairRow<T>& row) const {
    int end = row.flags.selected ? row.span(first, held).end : 0;
    for (int at = lane; at < end; at += threads) row.copy(a + at, b + at, first + at);
  }

  // Both logits of a column, if it is in a piece of this thread's.
  ADAMIX_DEVICE bool find(const PairRow<T>& row, int column, float& x, float& y) const {
    int piece = (row.head + column) / kSize, at = piece - first;
    bool own = at >= 0 && at < span.end, behind = tail.end > 0 && at >= held;
    if (behind ? (at - held) % threads != lane : !own || at % threads != lane) return false;
    int e = (row.head + column) % kSize;
    x = to_float(behind ? row.a[column] : a[at].values[e]), y = to_float(behind ? row.b[column] : b[at].values[e]);
    return true;
  }

  // Maxima; those of the tail too where `tails`.
  ADAMIX_DEVICE void tops(const PairRow<T>& row, bool tails, float& top_a, float& top_b) const {
    PieceTop<T> most_a, most_b;
    for (int at = lane; at < span.end; at += threads) most_a.add(a[at]), most_b.add(b[at]);
    for (int at = lane; tails && at < tail.end; at += threads) {
      Piece<T> x, y;
      row.read(x, y, held + at);
      most_a.add(x), most_b.add(y);
    }
    top_a = most_a.value(), top_b = most_b.value();
  }

  // The tail's sums, for maxima that rise as it is read; returns its columns.
  ADAMIX_DEVICE float rising_sums(const PairRow<T>& row, PairStatistics& s, bool totals) const {
    float columns = 0.f;
    auto rise = [&](const Piece<T>& x, const Piece<T>& y) {
      PieceTop<T> most_a, most_b;
      most_a.add(x), most_b.add(y);
      float top_a = most_a.value(), top_b = most_b.value();
      if (top_a > s.top_a || top_b > s.top_b) s.move_to(fmaxf(top_a, s.top_a), fmaxf(top_b, s.top_b), columns);
    };
    walk(
        tail, lane, threads,
        [&](int at) {
          Piece<T> x, y;
          row.read_whole(x, y, held + at);
          rise(x, y);
          s.template add<false, false>(x, y, totals);
          columns += kSize;
        },
        [&](int at) {
          Piece<T> x, y;
          int begin = row.begin(held + at), end = row.end(held + at);
          row.read(x, y, held + at);
          rise(x, y);
          s.template add<false, true>(x, y, totals, begin, end);
          columns += static_cast<float>(end - begin);
        });
    return columns;
  }

  // The sums for maxima that are settled; those of the tail too where `tails`. Careful: where a logit may be -inf.
  template <bool Full, bool Careful>
  ADAMIX_DEVICE void sums(const PairRow<T>& row, PairStatistics& s, bool totals, bool tails) const {
    auto edge = [&](const Piece<T>& x, const Piece<T>& y, int piece) {
      s.template add<Full, true>(x, y, totals, row.begin(piece), row.end(piece));
    };
    auto tail_edge = [&](int at) {
      Piece<T> x, y;
      row.read(x, y, held + at);
      edge(x, y, held + at);
    };
    PairSpan behind = tails ? tail : PairSpan{0, 0, 0};
    if constexpr (Careful) {
      for (int at = lane; at < span.end; at += threads) edge(a[at], b[at], first + at);
      for (int at = lane; at < behind.end; at += threads) tail_edge(at);
    } else {
      constexpr bool kLifted = sizeof(T) == 2 && !Full;
      const Lifted of_a(s.top_a), of_b(s.top_b);
      auto add = [&](const Piece<T>& x, const Piece<T>& y) {
        if constexpr (kLifted) {
          s.add_lifted(of_a, of_b, x, y, totals);
        } else {
          s.template add<Full, false>(x, y, totals);
        }
      };
      auto lift = [&] {
        if constexpr (kLifted) s.lift(of_a, of_b);
      };
      auto back = [&] {
        if constexpr (kLifted) s.back(of_a, of_b);
      };
      lift();
      walk(
          span, lane, threads,
          [&](int at) {
            // In two loads.
            Piece<T> x = a[at], y = b[at];
            add(x, y);
          },
          back, [&](int at) { edge(a[at], b[at], first + at); });
      if (!tails) return;
      lift();
      walk(
          behind, lane, threads,
          [&](int at) {
            Piece<T> x, y;
            row.read_whole(x, y, held + at);
            add(x, y);
          },
          back, tail_edge);
    }
  }

  // Writes both gradients, and starts the copies of the next row, if it is selected, into what has been used.
  // careful: alike in a warp.
  template <bool Full>
  ADAMIX_DEVICE void gradients(const PairRow<T>& row, const PairSlopes& slopes, T* da, T* db, bool careful,
                               const PairRow<T>& next) const {
    bool more = next.flags.selected;
    PairSpan ahead = more ? next.span(first, held) : span;
    auto edge = [&](Piece<T> x, Piece<T> y, int piece) {
      slopes.template piece<Full, true>(x, y);
      if (da != nullptr) row.write_elements(da, x, piece);
      if (db != nullptr) row.write_elements(db, y, piece);
    };
    constexpr bool kLifted = sizeof(T) == 2 && !Full;
    const LiftedSlopes lifted(slopes);
    auto slope = [&](Piece<T>& x, Piece<T>& y) {
      if constexpr (kLifted) {
        lifted.piece(x, y);
      } else {
        slopes.template piece<Full, false>(x, y);
      }
    };
    if (row.fits(da) && row.fits(db) && next.same && !careful &&
        (!kLifted || (may_be_lifted(slopes.top_a) && may_be_lifted(slopes.top_b)))) {
      int column = row.column(first), next_column = more ? next.column(first) : 0;
      Piece<T>* to_a = da == nullptr ? nullptr : reinterpret_cast<Piece<T>*>(da + column);
      Piece<T>* to_b = db == nullptr ? nullptr : reinterpret_cast<Piece<T>*>(db + column);
      const Piece<T>* from_a = reinterpret_cast<const Piece<T>*>(next.a + next_column);
      const Piece<T>* from_b = reinterpret_cast<const Piece<T>*>(next.b + next_column);
      auto rest = [&](int at) {
        if (at < span.end) edge(a[at], b[at], first + at);
        if (more && at < ahead.end) next.copy(a + at, b + at, first + at);
      };
      if (da != nullptr && db != nullptr && more) {
        walk(
            both_of(span, ahead), lane, threads,
            [&](int at) {
              Piece<T> x = a[at], y = b[at];
              CopyAhead<T> next_a, next_b;
              next_a.start(from_a + at), next_b.start(from_b + at);
              slope(x, y);
              to_a[at] = x, to_b[at] = y;
              next_a.finish(a + at), next_b.finish(b + at);
            },
            rest);
      } else {
        walk(
            both_of(span, ahead), lane, threads,
            [&](int at) {
              Piece<T> x = a[at], y = b[at];
              CopyAhead<T> next_a, next_b;
              if (more) next_a.start(from_a + at), next_b.start(from_b + at);
              slope(x, y);
              if (da != nullptr) to_a[at] = x;
              if (db != nullptr) to_b[at] = y;
              if (more) next_a.finish(a + at), next_b.finish(b + at);
            },
            rest);
      }
      walk(
          tail, lane, threads,
          [&](int at) {
            Piece<T> x, y;
            row.read_whole(x, y, held + at);
            slope(x, y);
            if (da != nullptr) to_a[held + at] = x;
            if (db != nullptr) to_b[held + at] = y;
          },
          [&](int at) {
            Piece<T> x, y;
            row.read(x, y, held + at);
            edge(x, y, held + at);
          });
      return;
    }
    auto write = [&](Piece<T> x, Piece<T> y, int piece, bool have) {
      if (have) slopes.template piece<Full, true>(x, y);
      if (da != nullptr) row.write(da, x, piece, have, kAcross);
      if (db != nullptr) row.write(db, y, piece, have, kAcross);
    };
    int end = span.end > ahead.end ? span.end : ahead.end;
    for (int at = lane; at - lane % 32 < end; at += threads) {
      Piece<T> x{}, y{};
      if (at < span.end) x = a[at], y = b[at];
      write(x, y, first + at, at < span.end);
      if (more && at < ahead.end) next.copy(a + at, b + at, first + at);
    }
    for (int at = lane; at - lane % 32 < tail.end; at += threads) {
      Piece<T> x{}, y{};
      if (at < tail.end) row.read(x, y, held + at);
      write(x, y, held + at, at < tail.end);
    }
  }

  // Of an unselected row.
  ADAMIX_DEVICE void clear(T* target, int classes, bool tails) const {
    if (target == nullptr) return;
    int head = head_of(target), pieces = (head + classes + kSize - 1) / kSize;
    int end = tails || pieces < first + held ? pieces : first + held;
    for (int piece = first + lane; piece < end; piece += threads) {
      int column = piece * kSize - head;
      if (column >= 0 && column + kSize <= classes) {
        *reinterpret_cast<Piece<T>*>(target + column) = filled<T>(0.f);
        continue;
      }
      for (int e = 0; e < kSize; ++e) {
        if (column + e >= 0 && column + e < classes) target[column + e] = from_float<T>(0.f);
      }
    }
  }
};

}  // namespace adamix
