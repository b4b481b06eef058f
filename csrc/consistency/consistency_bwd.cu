// Gradients from the logits and the rows' statistics: one read and one write of each logit; or nothing at all.
#include "common/shared_memory.h"
#include "consistency/pair_row.h"
#include "consistency/pair_team.h"

#if defined(ADAMIX_LAUNCHERS)
#include <algorithm>
#include <limits>
#endif

namespace adamix {

constexpr int kPairGradThreads = 128;

// Where an item's team begins.
struct PairItem {
  int row, begin;  // the row, which there may not be; the first piece
};

ADAMIX_DEVICE PairItem item_of(const PairCut& cut, uint32_t item) {
  uint32_t tile = cut.chunks.quotient(item);
  return {static_cast<int>(tile * (kPairGradThreads / cut.lanes) + threadIdx.x / cut.lanes),
          static_cast<int>(item - tile * cut.chunks.by) * cut.chunk};
}

// Pieces [begin, end) of a row, one for each of its lanes at a time: write(to, piece, have), all lanes of the warp.
template <typename Body>
ADAMIX_DEVICE void for_pieces(const PairCut& cut, int begin, int pieces, Body body) {
  int end = pieces - begin < cut.chunk ? pieces : begin + cut.chunk, lane = threadIdx.x % cut.lanes;
  for (int piece = begin + lane; piece - lane < end; piece += cut.lanes) body(piece, piece < end);
}

template <typename T, bool Full>
__global__ void __launch_bounds__(kPairGradThreads, 5) pair_grad_kernel(PairGrad<T> p) {
  if (p.one != nullptr && *p.one == p.expected) return;
  bool labelled = p.sums.labels.data != nullptr;
  PairScales scales{p.scales[0], p.scales[labelled ? 1 : 0]};

  for (uint32_t item = blockIdx.x; item < p.cut.items; item += gridDim.x) {
    PairItem at = item_of(p.cut, item);
    PairRow<T> row(p.a, p.b, p.sums, at.row, p.classes);
    T* da = row.live ? place_of(p.da, row.row) : nullptr;
    T* db = row.live ? place_of(p.db, row.row) : nullptr;
    PairResult r{};
    float entropy = 0.f, pair = 0.f;
    if (row.flags.selected) {
      const float* stats = p.stats + at.row;
      int64_t step = p.sums.rows;
      r.top_a = stats[0], r.top_b = stats[step], r.log_a = stats[2 * step], r.log_b = stats[3 * step];
      if (Full) r.mean_p = stats[4 * step], r.mean_q = stats[5 * step];
      PairScales shares = shares_of(p.sums, scales, p.grad.data == nullptr ? 1.f : p.grad.data[p.grad.offset(row.row)]);
      entropy = row.flags.counted ? shares.entropy : 0.f, pair = shares.pair;
    }
    PairSlopes slopes(r, entropy, pair, p.rest);
    if constexpr (Full) slopes.settle();
    int label = row.flags.counted ? row.flags.label : -1, label_piece = (row.head + label) / Piece<T>::kSize;
    bool across = p.cut.lanes >= 32;
    for_pieces(p.cut, at.begin, row.pieces, [&](int piece, bool have) {
      Piece<T> ga = filled<T>(0.f), gb = ga;
      if (have && row.flags.selected) {
        row.read(ga, gb, piece);
        float x = 0.f, y = 0.f;
        bool has = label >= 0 && piece == label_piece;
        if (has) x = to_float(row.a[label]), y = to_float(row.b[label]);
        slopes.template piece<Full, Full>(ga, gb);
        if (has) {
          float slope = slopes.template label<T, Full>(x, y, 1.f - p.smoothing + p.rest);
          put(ga, (row.head + label) % Piece<T>::kSize, from_float<T>(slope));
        }
      }
      if (da != nullptr) row.write(da, ga, piece, have, across);
      if (db != nullptr) row.write(db, gb, piece, have, across);
    });
  }
}

// x *= factor, unless that is 1.
template <typename T>
__global__ void __launch_bounds__(kPairGradThreads) pair_scale_kernel(PairScale<T> p) {
  float factor = *p.factor;
  if (factor == 1.f) return;
  PairSums sums{};
  sums.rows = p.rows;
  Rows<const T> from{p.x.data, p.x.batch_stride, p.x.token_stride, p.x.tokens, p.x.aligned};
  for (uint32_t item = blockIdx.x; item < p.cut.items; item += gridDim.x) {
    PairItem at = item_of(p.cut, item);
    if (at.row >= p.rows) continue;
    PairRow<T> row(from, from, sums, at.row, p.classes);
    T* to = place_of(p.x, row.row);
    for_pieces(p.cut, at.begin, row.pieces, [&](int piece, bool have) {
      if (!have) return;
      Piece<T> values = row.whole(piece) ? *reinterpret_cast<const Piece<T>*>(row.a + row.column(piece))
                                         : load_elements(row.a, row.column(piece), p.classes);
#pragma unroll
      for (int e = 0; e < Piece<T>::kSize; ++e) values.values[e] = from_float<T>(to_float(values.values[e]) * factor);
      row.write(to, values, piece, true, false);
    });
  }
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
  PairStatistics s{};
  s.sum_a = sums[0], s.total = sums[1];
  leave_share(s, scratch);
  __syncthreads();
  if (threadIdx.x < 32) join_warps(s, scratch);
  if (threadIdx.x == 0) store_losses(p, scales, s.sum_a, s.total);
}

#define ADAMIX_INSTANTIATE(T)                                       \
  template __global__ void pair_grad_kernel<T, false>(PairGrad<T>); \
  template __global__ void pair_grad_kernel<T, true>(PairGrad<T>);  \
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
  int lanes = classes <= 64 ? 4 : classes <= 1024 ? 32 : kPairGradThreads;
  int chunk = lanes * kPairAhead, chunks = (pieces + chunk - 1) / chunk, teams = kPairGradThreads / lanes;
  int64_t items = (static_cast<int64_t>(rows) + teams - 1) / teams * chunks;
  if (items > std::numeric_limits<int>::max()) throw std::runtime_error("logits: got more than 2^40 of them");
  return {lanes, chunk, divisor(chunks), static_cast<uint32_t>(items)};
}

static dim3 blocks_of(const PairCut& cut) { return dim3(std::min(cut.items, kPairTiles)); }

template <typename T>
void launch_pair_grad(PairGrad<T> params, const Device& device) {
  params.cut = cut_rows<T>(params.sums.rows, params.classes);
  auto kernel = params.full ? pair_grad_kernel<T, true> : pair_grad_kernel<T, false>;
  launch("consistency_grad", kernel, {blocks_of(params.cut), kPairGradThreads, 0}, device, params);
}

template <typename T>
void launch_pair_scale(PairScale<T> params, const Device& device) {
  params.cut = cut_rows<T>(params.rows, params.classes);
  launch("consistency_rescale", pair_scale_kernel<T>, {blocks_of(params.cut), kPairGradThreads, 0}, device, params);
}

template void launch_pair_grad(PairGrad<float>, const Device&);
template void launch_pair_grad(PairGrad<half>, const Device&);
template void launch_pair_grad(PairGrad<bfloat16>, const Device&);
template void launch_pair_scale(PairScale<float>, const Device&);
template void launch_pair_scale(PairScale<half>, const Device&);
template void launch_pair_scale(PairScale<bfloat16>, const Device&);

void launch_pair_finish(const PairSums& params, const Device& device) {
  Shape shape{dim3(1), kPairBlockThreads, shared_bytes<PairScratch>()};
  launch("consistency_finish", pair_finish_kernel, shape, device, params);
}
#endif

}  // namespace adamix
