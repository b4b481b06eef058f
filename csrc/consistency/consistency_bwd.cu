// Gradients from the logits and the rows' statistics: one read and one write of each logit; or nothing at all.
#include "common/shared_memory.h"
#include "consistency/pair_row.h"
#include "consistency/pair_team.h"

#if defined(ADAMIX_LAUNCHERS)
#include <algorithm>
#include <limits>
#endif

namespace adamix {

// Where an item's team begins.
struct PairItem {
  int row, begin;  // the row, which there may not be; the first piece
};

ADAMIX_DEVICE PairItem item_of(const PairCut& cut, uint32_t item) {
  uint32_t tile = cut.chunks.quotient(item);
  return {static_cast<int>(tile * (kPairThreads / cut.lanes) + threadIdx.x / cut.lanes),
          static_cast<int>(item - tile * cut.chunks.by) * cut.chunk};
}

template <typename T>
__global__ void __launch_bounds__(kPairThreads, 5) pair_grad_kernel(PairGrad<T> p) {
  if (p.correct && *p.grad.data == 1.f) return;
  int lane = threadIdx.x % p.cut.lanes;
  bool labelled = p.sums.labels.data != nullptr;
  PairScales scales{p.scales[0], p.scales[labelled ? 1 : 0]};
  PairShares shares = shares_of(p.sums, scales);

  for (uint32_t item = blockIdx.x; item < p.cut.items; item += gridDim.x) {
    PairItem at = item_of(p.cut, item);
    if (at.row >= p.sums.rows) continue;
    PairRow<T> row(p.a, p.b, p.sums, at.row, p.classes);
    PairResult r{};
    float entropy = 0.f, half = 0.f;
    if (row.flags.selected) {
      const float* stats = p.stats + at.row;
      int64_t step = p.sums.rows;
      r.top_a = stats[0], r.top_b = stats[step], r.log_a = stats[2 * step], r.log_b = stats[3 * step];
      if (p.full) r.mean_p = stats[4 * step], r.mean_q = stats[5 * step];
      float grad = p.grad.data == nullptr ? 1.f : p.grad.data[p.grad.offset(row.row)];
      entropy = row.flags.counted ? grad * shares.entropy : 0.f, half = 0.5f * grad * shares.pair;
    }
    T* da = place_of(p.da, row.row);
    T* db = place_of(p.db, row.row);
    int end = row.pieces - at.begin < p.cut.chunk ? row.pieces : at.begin + p.cut.chunk;
    for (int piece = at.begin + lane; piece < end; piece += p.cut.lanes) {
      Piece<T> ga = zeros<T>(), gb = zeros<T>();
      if (row.flags.selected) {
        row.read(ga, gb, piece);
        row.slopes(ga, gb, piece, r, entropy, half, p.smoothing, p.rest, p.full);
      }
      if (da != nullptr) row.write(da, ga, piece);
      if (db != nullptr) row.write(db, gb, piece);
    }
  }
}

// x *= factor, unless that is 1.
template <typename T>
__global__ void __launch_bounds__(kPairThreads) pair_scale_kernel(PairScale<T> p) {
  float factor = *p.factor;
  if (factor == 1.f) return;
  int lane = threadIdx.x % p.cut.lanes;
  PairSums sums{};
  sums.rows = p.rows;
  Rows<const T> from{p.x.data, p.x.batch_stride, p.x.token_stride, p.x.tokens, p.x.aligned};
  for (uint32_t item = blockIdx.x; item < p.cut.items; item += gridDim.x) {
    PairItem at = item_of(p.cut, item);
    if (at.row >= p.rows) continue;
    PairRow<T> row(from, from, sums, at.row, p.classes);
    T* to = place_of(p.x, row.row);
    int end = row.pieces - at.begin < p.cut.chunk ? row.pieces : at.begin + p.cut.chunk;
    for (int piece = at.begin + lane; piece < end; piece += p.cut.lanes) {
      Piece<T> values =
          row.whole(piece) ? *reinterpret_cast<const Piece<T>*>(row.a + row.column(piece)) : row.elements(row.a, piece);
#pragma unroll
      for (int e = 0; e < Piece<T>::kSize; ++e) values.values[e] = from_float<T>(to_float(values.values[e]) * factor);
      row.write(to, values, piece);
    }
  }
}

// The numbers of rows, ahead of a launch whose blocks would each count too many.
__global__ void __launch_bounds__(kPairBlockThreads) pair_count_kernel(PairSums p) {
  SharedMemory memory;
  PairScratch scratch(memory);
  PairScales scales = find_scales(p, scratch);
  if (threadIdx.x == 0) store_scales(p, scales);
}

// The losses from the blocks' sums, in the order of the blocks.
__global__ void __launch_bounds__(kPairBlockThreads) pair_finish_kernel(PairSums p) {
  SharedMemory memory;
  PairScratch scratch(memory);
  PairScales scales = find_scales(p, scratch);
  float sums[2] = {0.f, 0.f};
  for (int part = threadIdx.x; part < p.parts; part += blockDim.x) {
    sums[0] += p.partial[part], sums[1] += p.partial[p.parts + part];
  }
  reduce_row<0>(sums, Add{}, 0.f, scratch, 0);
  if (threadIdx.x == 0) store_losses(p, scales, sums[0], sums[1]);
}

#define ADAMIX_INSTANTIATE(T)                                \
  template __global__ void pair_grad_kernel<T>(PairGrad<T>); \
  template __global__ void pair_scale_kernel<T>(PairScale<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
constexpr int kPairAhead = 4;          // pieces that a thread takes of a row
constexpr uint32_t kPairTiles = 4096;  // blocks, at most

template <typename T>
static PairCut cut_rows(int rows, int classes) {
  int pieces = pieces_of(classes, Piece<T>::kSize);
  int lanes = classes <= kPairFewClasses ? 4 : classes <= kPairWarpClasses ? 32 : kPairThreads;
  int chunk = lanes * kPairAhead, chunks = (pieces + chunk - 1) / chunk, teams = kPairThreads / lanes;
  int64_t items = (static_cast<int64_t>(rows) + teams - 1) / teams * chunks;
  if (items > std::numeric_limits<int>::max()) throw std::runtime_error("logits: got more than 2^40 of them");
  return {lanes, chunk, divisor(chunks), static_cast<uint32_t>(items)};
}

static dim3 blocks_of(const PairCut& cut) { return dim3(std::min(cut.items, kPairTiles)); }

template <typename T>
void launch_pair_grad(PairGrad<T> params, const Device& device) {
  params.cut = cut_rows<T>(params.sums.rows, params.classes);
  launch("consistency_grad", pair_grad_kernel<T>, {blocks_of(params.cut), kPairThreads, 0}, device, params);
}

template <typename T>
void launch_pair_scale(PairScale<T> params, const Device& device) {
  params.cut = cut_rows<T>(params.rows, params.classes);
  launch("consistency_rescale", pair_scale_kernel<T>, {blocks_of(params.cut), kPairThreads, 0}, device, params);
}

template void launch_pair_grad(PairGrad<float>, const Device&);
template void launch_pair_grad(PairGrad<half>, const Device&);
template void launch_pair_grad(PairGrad<bfloat16>, const Device&);
template void launch_pair_scale(PairScale<float>, const Device&);
template void launch_pair_scale(PairScale<half>, const Device&);
template void launch_pair_scale(PairScale<bfloat16>, const Device&);

static Shape one_block() { return {dim3(1), kPairBlockThreads, shared_bytes<PairScratch>()}; }

void launch_pair_count(const PairSums& params, const Device& device) {
  launch("consistency_count", pair_count_kernel, one_block(), device, params);
}

void launch_pair_finish(const PairSums& params, const Device& device) {
  launch("consistency_finish", pair_finish_kernel, one_block(), device, params);
}
#endif

}  // namespace adamix
