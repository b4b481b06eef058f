// A thread's share of a row pair: the pieces that it holds in shared memory, and those of the tail, which lies behind
// all that is held and is read where it lies.
#pragma once

#include "consistency/copy_ahead.h"
#include "consistency/pair_row.h"

namespace adamix {

// Threads: of a block whose rows it holds, as a constant, which saves instructions; 0: rows may be longer than what is
// held.
template <typename T, int Lanes, int Threads = 0>
struct PairShare {
  static constexpr int kSize = Piece<T>::kSize;
  static constexpr bool kTails = Lanes == 0 && Threads == 0;
  static constexpr bool kAcross = Lanes == 0 || Lanes == 32;  // a warp has one row

  Piece<T>*a, *b;       // [held]
  int lane;             // of the row, in this block
  int first, held;      // of the row's pieces, this block's
  PairSpan span, tail;  // of an unselected row, nothing

  // The lanes of a row in this block.
  static ADAMIX_DEVICE int threads() {
    if constexpr (Lanes > 0) return Lanes;
    if constexpr (Threads > 0) return Threads;
    // With tails, all that a block may have; of float, rows that are held come here too, with fewer.
    if constexpr (sizeof(T) == 2) return kPairBlockThreads;
    return static_cast<int>(blockDim.x);
  }

  ADAMIX_DEVICE void take(const PairRow<T>& row, bool tails) {
    span = tail = {0, 0, 0};
    if (!row.flags.selected) return;
    span = row.span(first, held);
    if (tails) tail = row.span(held, row.pieces);
  }

  // All of a row's pieces that the block can hold.
  ADAMIX_DEVICE void copy(const PairRow<T>& row) const {
    int end = row.flags.selected ? row.span(first, held).end : 0;
    for (int at = lane; at < end; at += threads()) row.copy(a + at, b + at, first + at);
  }

  // Both logits of the label's column, if it is in a piece of this thread's.
  ADAMIX_DEVICE bool find_label(const PairRow<T>& row, float& x, float& y) const {
    constexpr int kBits = kSize == 8 ? 3 : 2;
    int at = (row.label >> kBits) - first;
    bool behind = tail.end > 0 && at >= held;
    if (((behind ? at - held : at) & (threads() - 1)) != lane) return false;  // threads: a power of two
    if (row.label < 0 || at < 0 || (!behind && at >= span.end)) return false;
    if (behind) {
      x = to_float(row.a[row.flags.label]), y = to_float(row.b[row.flags.label]);
    } else {
      x = to_float(a[at].values[row.label % kSize]), y = to_float(b[at].values[row.label % kSize]);
    }
    return true;
  }

  // Maxima; those of the tail too where `tails`.
  ADAMIX_DEVICE void tops(const PairRow<T>& row, bool tails, float& top_a, float& top_b) const {
    PieceTop<T> most_a, most_b;
    auto add = [&](int at) { most_a.add(a[at]), most_b.add(b[at]); };
    int own = lane;
#pragma unroll 1
    for (; own < span.end - threads(); own += 2 * threads()) add(own), add(own + threads());
    if (own < span.end) add(own);
    for (int at = lane; tails && at < tail.end; at += threads()) {
      Piece<T> x, y;
      row.read(x, y, held + at);
      most_a.add(x), most_b.add(y);
    }
    top_a = most_a.value(), top_b = most_b.value();
  }

  // body(x, y, at) for the whole pieces of a part of the tail: those of b in one load each where it lies as a does.
  template <typename Body, typename Between, typename Edge>
  ADAMIX_DEVICE void walk_tail(const PairRow<T>& row, PairSpan part, Body body, Between between, Edge edge) const {
    if constexpr (kTails) {
      const Piece<T>* from_a = reinterpret_cast<const Piece<T>*>(row.a + row.column(held));
      const Piece<T>* from_b = reinterpret_cast<const Piece<T>*>(row.b + row.column(held));
      auto same = [&](int at) { body(Piece<T>(from_a[at]), Piece<T>(from_b[at]), at); };
      auto other = [&](int at) { body(Piece<T>(from_a[at]), row.whole_b(row.column(held + at)), at); };
      if (row.same) {
        walk(part, lane, threads(), same, between, edge);
      } else {
        walk(part, lane, threads(), other, between, edge);
      }
    }
  }

  // The tail's sums, for maxima that rise as it is read; returns its columns.
  ADAMIX_DEVICE float rising_sums(const PairRow<T>& row, PairStatistics& s, bool totals) const {
    constexpr bool kLifted = sizeof(T) == 2;
    float columns = 0.f;
    Lifted of_a(finite_top(s.top_a)), of_b(finite_top(s.top_b));
    auto lift = [&] {
      if constexpr (kLifted) {
        of_a = Lifted(finite_top(s.top_a)), of_b = Lifted(finite_top(s.top_b)), s.lift(of_a, of_b);
      } else {
        s.lift();
      }
    };
    auto back = [&] {
      if constexpr (kLifted) {
        s.back(of_a, of_b);
      } else {
        s.back();
      }
    };
    auto higher = [&](const Piece<T>& x, const Piece<T>& y, float& top_a, float& top_b) {
      PieceTop<T> most_a, most_b;
      most_a.add(x), most_b.add(y);
      top_a = most_a.value(), top_b = most_b.value();
      return top_a > s.top_a || top_b > s.top_b;
    };
    lift();
    walk_tail(
        row, tail,
        [&](const Piece<T>& x, const Piece<T>& y, int) {
          float top_a, top_b;
          if (higher(x, y, top_a, top_b)) {
            back();
            s.move_to(fmaxf(top_a, s.top_a), fmaxf(top_b, s.top_b), columns);
            lift();
          }
          if constexpr (kLifted) {
            s.add_lifted(of_a, of_b, x, y);
          } else {
            s.template add<false, false>(x, y);
          }
          if (totals) s.add_total(x);
          columns += kSize;
        },
        back,
        [&](int at) {
          Piece<T> x, y;
          float top_a, top_b;
          int begin = row.begin(held + at), end = row.end(held + at);
          row.read(x, y, held + at);
          if (higher(x, y, top_a, top_b)) s.move_to(fmaxf(top_a, s.top_a), fmaxf(top_b, s.top_b), columns);
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
      for (int at = lane; at < span.end; at += threads()) edge(a[at], b[at], first + at);
      for (int at = lane; at < behind.end; at += threads()) tail_edge(at);
    } else {
      constexpr bool kLifted = sizeof(T) == 2 && !Full;
      const Lifted of_a(s.top_a), of_b(s.top_b);
      auto add = [&](const Piece<T>& x, const Piece<T>& y) {
        if constexpr (kLifted) {
          s.add_lifted(of_a, of_b, x, y);
        } else {
          s.template add<Full, false>(x, y);
        }
      };
      auto lift = [&] {
        if constexpr (kLifted) {
          s.lift(of_a, of_b);
        } else {
          s.lift();
        }
      };
      auto back = [&] {
        if constexpr (kLifted) {
          s.back(of_a, of_b);
        } else {
          s.back();
        }
      };
      auto nothing = [](int) {};
      // There are sums already where the tail came first.
      if (kTails && tail.end > 0) lift();
      walk(
          span, lane, threads(),
          [&](int at) {
            // In two loads.
            Piece<T> x = a[at], y = b[at];
            add(x, y);
          },
          back, [&](int at) { edge(a[at], b[at], first + at); });
      if (totals) {
        walk(span, lane, threads(), [&](int at) { s.add_total(a[at]); }, [] {}, nothing);
      }
      if (!tails) return;
      lift();
      walk_tail(row, behind, [&](const Piece<T>& x, const Piece<T>& y, int) { add(x, y); }, back, tail_edge);
      if (totals) {
        walk_tail(row, behind, [&](const Piece<T>& x, const Piece<T>&, int) { s.add_total(x); }, [] {}, nothing);
      }
    }
  }

  // Writes both gradients, and starts the copies of the next row, if it is selected, into what has been used.
  // fits: they lie as the logits do. careful: alike in a warp.
  template <bool Full>
  ADAMIX_DEVICE void gradients(const PairRow<T>& row, const PairSlopes& slopes, T* da, T* db, bool fits, bool careful,
                               const PairRow<T>& next) const {
    bool more = next.flags.selected;
    PairSpan ahead = more ? next.span(first, held) : span;
    auto edge = [&](Piece<T> x, Piece<T> y, int piece) {
      slopes.template piece<Full, true>(x, y);
      if (da != nullptr) row.write_elements(da, x, piece);
      if (db != nullptr) row.write_elements(db, y, piece);
    };
    constexpr bool kLifted = sizeof(T) == 2 && !Full;
    auto slope = [&](Piece<T>& x, Piece<T>& y) {
      if constexpr (kLifted) {
        slopes.template lifted_piece<true>(x, y);
      } else {
        slopes.template piece<Full, false>(x, y);
      }
    };
    if (fits && next.same && !careful && (!kLifted || slopes.lifted())) {
      int column = row.column(first), next_column = more ? next.column(first) : 0;
      Piece<T>* to_a = da == nullptr ? nullptr : reinterpret_cast<Piece<T>*>(da + column);
      Piece<T>* to_b = db == nullptr ? nullptr : reinterpret_cast<Piece<T>*>(db + column);
      const Piece<T>* from_a = reinterpret_cast<const Piece<T>*>(next.a + next_column);
      const Piece<T>* from_b = reinterpret_cast<const Piece<T>*>(next.b + next_column);
      auto rest = [&](int at) {
        if (at < span.end) edge(a[at], b[at], first + at);
        if (more && at < ahead.end) next.copy(a + at, b + at, first + at);
      };
      CopyAhead<T> next_a, next_b;
      if (da != nullptr && db != nullptr && more && slopes.rest == 0.f) {
        walk(
            both_of(span, ahead), lane, threads(),
            [&](int at) {
              Piece<T> x = a[at], y = b[at];
              next_a.start(from_a + at), next_b.start(from_b + at);
              if constexpr (kLifted) {
                slopes.template lifted_piece<false>(x, y);
              } else {
                slopes.template piece<Full, false, false>(x, y);
              }
              to_a[at] = x, to_b[at] = y;
            },
            [&](int at) { next_a.finish(a + at, from_a + at), next_b.finish(b + at, from_b + at); }, [] {}, rest);
      } else {
        walk(
            both_of(span, ahead), lane, threads(),
            [&](int at) {
              Piece<T> x = a[at], y = b[at];
              if (more) next_a.start(from_a + at), next_b.start(from_b + at);
              slope(x, y);
              if (da != nullptr) to_a[at] = x;
              if (db != nullptr) to_b[at] = y;
            },
            [&](int at) {
              if (more) next_a.finish(a + at, from_a + at), next_b.finish(b + at, from_b + at);
            },
            [] {}, rest);
      }
      walk_tail(
          row, tail,
          [&](Piece<T> x, Piece<T> y, int at) {
            slope(x, y);
            if (da != nullptr) to_a[held + at] = x;
            if (db != nullptr) to_b[held + at] = y;
          },
          [] {},
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
    for (int at = lane; at - lane % 32 < end; at += threads()) {
      Piece<T> x{}, y{};
      if (at < span.end) x = a[at], y = b[at];
      write(x, y, first + at, at < span.end);
      if (more && at < ahead.end) next.copy(a + at, b + at, first + at);
    }
    for (int at = lane; at - lane % 32 < tail.end; at += threads()) {
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
    for (int piece = first + lane; piece < end; piece += threads()) {
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
