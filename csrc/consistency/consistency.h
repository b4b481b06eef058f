// Two passes' logits a and b, p and q their softmaxes, d = log p - log q: row by row the cross-entropy of a and
// J = 1/2 sum (p - q) d, their sums over the rows that count, and the gradients of both.
#pragma once

#include "common/dtype.h"
#include "common/launch.h"
#include "common/rows.h"
#include "common/scalar.h"

namespace adamix {

constexpr int kPairBlockThreads = 512;  // of a block, at most

// One value a row: data[(row / inner) * outer_stride + (row % inner) * inner_stride].
template <typename T>
struct PerRow {
  const T* data;
  int64_t outer_stride, inner_stride;
  Divisor inner;

  ADAMIX_BOTH int64_t offset(int row) const {
    if (inner.by == 1) return row * outer_stride;
    int outer = inner.quotient(row);
    return outer * outer_stride + (row - outer * static_cast<int>(inner.by)) * inner_stride;
  }
};

// Elements to a row of a pair; most rows are evenly spaced.
template <typename T>
ADAMIX_BOTH int64_t row_offset(const Rows<T>& rows, int row) {
  return rows.tokens.by == 1 ? row * rows.batch_stride : rows.offset(row);
}

// Which rows count, by how much, and where the sums over them go.
struct PairSums {
  PerRow<void> labels;         // int32 or int64; none: no cross-entropy
  PerRow<unsigned char> mask;  // bool; none: all rows, or with labels those that have one
  bool wide_labels;
  bool mean;  // the sums are divided by the numbers of rows
  Kind items;
  const void* num_items;  // replaces both numbers of rows
  const float* known;     // scales that were found before, or null
  int64_t ignore_index;
  float weight;  // of J in the loss
  int rows;
  // Results, each may be null. scales: [2], of the cross-entropy and of J; [1] without labels.
  float *scales, *loss, *cross_entropy, *consistency;
  float* sums;     // [2], of the rows' losses, not divided
  float* partial;  // [2, parts]: sums of the blocks
  int parts;
};

template <typename T>
struct PairLoss {
  using Element = T;
  Rows<const T> a, b;
  Rows<T> da, db;  // data null: not wanted; they may be a and b
  PairSums sums;
  float* stats;       // [4 or 6, n]: maxima of a and b, logs of the sums of exp(x - maximum), E_p d and E_q d; or null
  float* row_losses;  // [n], J; or null
  float expected;     // the gradient that will come in
  float smoothing, rest;  // label smoothing, and every class' part of it
  int classes;
  bool full;    // gradients of J itself, not of constant targets
  bool counts;  // every block finds the scales
  int slots;    // pieces of 16 bytes of a row that a block holds; what no block holds is read where it lies
};

// Rows cut into items: `chunk` pieces of `threads / lanes` rows.
struct PairCut {
  int lanes, chunk;  // threads of a row; pieces of a row that they take at a time
  Divisor chunks;    // of a row
  uint32_t items;
};

template <typename T>
struct PairGrad {
  using Element = T;
  Rows<const T> a, b;
  Rows<T> da, db;
  PairSums sums;
  PerRow<float> grad;  // of each row, or of all; none: 1
  const float* stats;
  const float* scales;
  float smoothing, rest;
  int classes;
  bool full;
  const float* one;  // a gradient that da and db are right for already where it is `expected`; or null
  float expected;
  PairCut cut;
};

template <typename T>
struct PairScale {
  Rows<T> x;
  const float* factor;
  int rows, classes;
  PairCut cut;
};

#if defined(ADAMIX_LAUNCHERS)
// How rows meet threads.
struct PairPlan {
  int lanes;    // threads of a row: 4, 32, or 0 for whole blocks
  int threads;  // of a block
  int cluster;  // blocks that share a row pair in their shared memory
  int slots;    // pieces of 16 bytes of a row that a block holds
  int groups;   // blocks, or clusters
};

// cluster: the most blocks that may share a row pair.
PairPlan plan_pairs(int rows, int classes, int element_bytes, const Device& device, int cluster);

// Of a block whose rows have `lanes` threads each: its threads, at most; its shared memory for rows of `slots` pieces.
int pair_loss_threads(int lanes);
size_t pair_loss_bytes(int lanes, int slots);

// What plan_pairs may count on for pairs of T, and that it may no longer count on the cluster of a plan.
template <typename T>
int largest_pair_cluster(const Device& device);
template <typename T>
void rule_out_pair_cluster(const Device& device, int cluster);

template <typename T>
void launch_pair_loss(PairLoss<T> params, const PairPlan& plan, const Device& device);
template <typename T>
void launch_pair_grad(PairGrad<T> params, const Device& device);
template <typename T>
void launch_pair_scale(PairScale<T> params, const Device& device);
void launch_pair_finish(const PairSums& params, const Device& device);
#endif

}  // namespace adamix
