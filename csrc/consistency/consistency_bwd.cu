// Gradients from the logits and the rows' statistics: one read and one write of each logit; or nothing at all.
#include "common/shared_memory.h"
#include "consistency/pair_row.h"
#include "consistency/pair_team.h"

#if defined(ADAMIX_LAUNCHERS)
#include <algorithm>
#endif

namespace adamix {

template <typename T>
__global__ void __launch_bounds__(kPairThreads, 5) pair_grad_kernel(PairGrad<T> p) {
  if (p.correct && *p.grad.data == 1.f) return;
  int teams = kPairThreads / p.lanes, team = threadIdx.x / p.lanes, lane = threadIdx.x % p.lanes;
  int chunks = (pieces_of(p.classes, Piece<T>::kSize) + p.chunk - 1) / p.chunk;
  int64_t tiles = (static_cast<int64_t>(p.sums.rows) + teams - 1) / teams;
  bool labelled = p.sums.labels.data != nullptr;
  PairScales scales{p.scales[0], p.scales[labelled ? 1 : 0]};
  PairShares shares = shares_of(p.sums, scales);

  for (int64_t item = blockIdx.x; item < tiles * chunks; item += gridDim.x) {
    int64_t number = item / chunks * teams + team;
    if (number >= p.sums.rows) continue;
    int begin = static_cast<int>(item % chunks) * p.chunk;
    PairRow<T> row(p.a, p.b, p.sums, static_cast<int>(number), p.classes);
    PairResult r{};
    float entropy = 0.f, half = 0.f;
    if (row.flags.selected) {
      const float* at = p.stats + number;
      int64_t step = p.sums.rows;
      r.top_a = at[0], r.top_b = at[step], r.log_a = at[2 * step], r.log_b = at[3 * step];
      if (p.full) r.mean_p = at[4 * step], r.mean_q = at[5 * step];
      float grad = p.grad.data == nullptr ? 1.f : p.grad.data[p.grad.offset(row.row)];
      entropy = row.flags.counted ? grad * shares.entropy : 0.f, half = 0.5f * grad * shares.pair;
    }
    T* da = place_of(p.da, row.row);
    T* db = place_of(p.db, row.row);
    int end = row.pieces - begin < p.chunk ? row.pieces : begin + p.chunk;
    for (int piece = begin + lane; piece < end; piece += p.lanes) {
      Piece<T> ga = zeros<T>(), gb = zeros<T>();
      if (row.flags.selected) {
        row.read(ga, gb, piece);
        row.slopes(ga, gb, piece, r, entropy, half, p.smoothing, p.full);
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
  int teams = kPairThreads / p.lanes, team = threadIdx.x / p.lanes, lane = threadIdx.x % p.lanes;
  int chunks = (pieces_of(p.classes, Piece<T>::kSize) + p.chunk - 1) / p.chunk;
  int64_t tiles = (static_cast<int64_t>(p.rows) + teams - 1) / teams;
  PairSums sums{};
  sums.rows = p.rows;
  Rows<const T> from{p.x.data, p.x.batch_stride, p.x.token_stride, p.x.tokens, p.x.aligned};
  for (int64_t item = blockIdx.x; item < tiles * chunks; item += gridDim.x) {
    int64_t number = item / chunks * teams + team;
    if (number >= p.rows) continue;
    int begin = static_cast<int>(item % chunks) * p.chunk;
    PairRow<T> row(from, from, sums, static_cast<int>(number), p.classes);
    T* to = place_of(p.x, row.row);
    int end = row.pieces - begin < p.chunk ? row.pieces : begin + p.chunk;
    for (int piece = begin + lane; piece < end; piece += p.lanes) {
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
constexpr int kPairAhead = 4;         // pieces that a thread takes of a row
constexpr int64_t kPairTiles = 4096;  // blocks, at most

// Chooses lanes and chunk; returns the blocks.
template <typename T, typename Params>
static dim3 cut(Params& params, int rows) {
  int pieces = pieces_of(params.classes, Piece<T>::kSize);
  params.lanes = params.classes <= kPairFewClasses ? 4 : params.classes <= kPairWarpClasses ? 32 : kPairThreads;
  params.chunk = params.lanes * kPairAhead;
  int64_t teams = kPairThreads / params.lanes;
  int64_t items = (rows + teams - 1) / teams * ((pieces + params.chunk - 1) / params.chunk);
  return dim3(static_cast<unsigned>(std::min(items, kPairTiles)));
}

template <typename T>
void launch_pair_grad(PairGrad<T> params, const Device& device) {
  dim3 grid = cut<T>(params, params.sums.rows);
  launch("consistency_grad", pair_grad_kernel<T>, {grid, kPairThreads, 0}, device, params);
}

template <typename T>
void launch_pair_scale(PairScale<T> params, const Device& device) {
  dim3 grid = cut<T>(params, params.rows);
  launch("consistency_rescale", pair_scale_kernel<T>, {grid, kPairThreads, 0}, device, params);
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
