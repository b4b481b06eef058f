// Losses, statistics and gradients of row pairs that fit into no shared memory: read once for the statistics and once
// more for the gradients. Where rows are few, several blocks take a part of one each, in two launches.
#include "common/shared_memory.h"
#include "consistency/pair_row.h"
#include "consistency/pair_team.h"

namespace adamix {

struct PairParts {
  float* at;
  int64_t step;

  ADAMIX_DEVICE void store(const PairStatistics& s) const {
    float values[kPairParts] = {s.top_a, s.top_b, s.sum_a,   s.sum_b, s.gap_a,
                                s.gap_b, s.total, s.columns, s.label, s.center};
#pragma unroll
    for (int i = 0; i < kPairParts; ++i) at[i * step] = values[i];
  }

  ADAMIX_DEVICE PairStatistics load(int split) const {
    const float* from = at + split * kPairParts * step;
    return {from[0],        from[step],     from[2 * step], from[3 * step], from[4 * step],
            from[5 * step], from[6 * step], from[7 * step], from[8 * step], from[9 * step]};
  }
};

// The statistics of a whole row from those of its parts, in their order.
ADAMIX_DEVICE PairStatistics join_parts(const PairParts& parts, int splits) {
  PairStatistics all;
  all.clear();
  for (int split = 0; split < splits; ++split) {
    PairStatistics part = parts.load(split);
    all.top_a = Max{}(all.top_a, part.top_a), all.top_b = Max{}(all.top_b, part.top_b);
  }
  for (int split = 0; split < splits; ++split) {
    PairStatistics part = parts.load(split);
    part.move_to(all.top_a, all.top_b);
    all.sum_a += part.sum_a, all.sum_b += part.sum_b;
    all.total += part.total, all.columns += part.columns, all.label += part.label;
  }
  all.center = PairStatistics::center_of(all.sum_a, all.sum_b);
  for (int split = 0; split < splits; ++split) {
    PairStatistics part = parts.load(split);
    float rise_a = finite_top(all.top_a) - finite_top(part.top_a);
    float rise_b = finite_top(all.top_b) - finite_top(part.top_b);
    float decay_a = expf(part.top_a - finite_top(all.top_a)), decay_b = expf(part.top_b - finite_top(all.top_b));
    // From one center to the other in one step, which is small where they are close.
    float step = part.center - (rise_a - rise_b) - all.center;
    all.gap_a += decay_a == 0.f ? 0.f : fmaf(step, part.sum_a, part.gap_a) * decay_a;
    all.gap_b += decay_b == 0.f ? 0.f : fmaf(step, part.sum_b, part.gap_b) * decay_b;
  }
  return all;
}

template <typename T>
__global__ void __launch_bounds__(kPairBlockThreads, 1) pair_online_kernel(PairLoss<T> p) {
  SharedMemory memory;
  PairScratch scratch(memory);
  bool gradients = p.da.data != nullptr || p.db.data != nullptr;
  PairScales scales{0.f, 0.f};
  if (p.counts) scales = find_scales(p.sums, scratch);
  PairShares shares = shares_of(p.sums, scales);
  float entropy_sum = 0.f, pair_sum = 0.f;
  int64_t step = p.sums.rows;

  // Parts are launched for few rows alone: they are fewer than 2^31.
  uint32_t splits = p.splits, items = p.sums.rows * splits;
  for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
    int number = static_cast<int>(item / splits), split = static_cast<int>(item % splits);
    PairRow<T> row(p.a, p.b, p.sums, number, p.classes);
    int begin = split * p.slots, end = row.pieces - begin < p.slots ? row.pieces : begin + p.slots;
    PairStatistics s;
    s.clear();
    if (p.stage != PairStage::kGradients && row.flags.selected) {
      for (int piece = begin + threadIdx.x; piece < end; piece += blockDim.x) {
        Piece<T> a, b;
        row.read(a, b, piece);
        row.add(s, a, b, piece);
      }
      if (split == 0 && threadIdx.x == 0 && row.flags.counted && row.flags.label >= 0) {
        s.label = to_float(row.a[row.flags.label]);
      }
    }
    if (p.stage == PairStage::kGradients) {
      if (row.flags.selected) s = join_parts({p.parts + number, step}, p.splits);
    } else {
      join_statistics<0>(s, scratch);
      if (p.stage == PairStage::kStatistics) {
        int behind = row.column(end);
        s.columns =
            static_cast<float>((behind < p.classes ? behind : p.classes) - (split == 0 ? 0 : row.column(begin)));
        if (threadIdx.x == 0) PairParts{p.parts + split * kPairParts * step + number, step}.store(s);
        continue;
      }
    }
    PairResult result = result_of(s, row.flags, p.classes, p.smoothing);
    if (p.full && p.splits == 1) {
      PairMeans means{{0.f, 0.f}};
      for (int piece = begin + threadIdx.x; row.flags.selected && piece < end; piece += blockDim.x) {
        Piece<T> a, b;
        row.read(a, b, piece);
        row.add(means, result, a, b);
      }
      join_means<0>(result, means, row.flags.selected, scratch);
    }
    if (split == 0) {
      entropy_sum += result.entropy, pair_sum += result.pair;
      if (threadIdx.x == 0) store_row(p, number, result);
    }
    if (!gradients) continue;
    T* da = place_of(p.da, number);
    T* db = place_of(p.db, number);
    float entropy = row.flags.counted ? shares.entropy : 0.f;
    for (int piece = begin + threadIdx.x; piece < end; piece += blockDim.x) {
      Piece<T> ga = zeros<T>(), gb = zeros<T>();
      if (row.flags.selected) {
        row.read(ga, gb, piece);
        row.slopes(ga, gb, piece, result, entropy, 0.5f * shares.pair, p.smoothing, p.rest, p.full);
      }
      if (da != nullptr) row.write(da, ga, piece);
      if (db != nullptr) row.write(db, gb, piece);
    }
  }
  if (p.stage != PairStage::kStatistics) {
    store_sums<0>(p.sums, scales, scratch, entropy_sum, pair_sum, blockIdx.x, gridDim.x);
  }
}

#define ADAMIX_INSTANTIATE(T) template __global__ void pair_online_kernel<T>(PairLoss<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_pair_online(const PairLoss<T>& params, const PairPlan& plan, const Device& device) {
  Shape shape{dim3(static_cast<unsigned>(plan.groups * plan.splits)), plan.threads, shared_bytes<PairScratch>()};
  PairLoss<T> mine = params;
  if (plan.splits > 1) {
    mine.stage = PairStage::kStatistics;
    mine.counts = false;
    launch("consistency_statistics", pair_online_kernel<T>, shape, device, mine);
    mine = params;
    mine.stage = PairStage::kGradients;
  }
  launch("consistency_online", pair_online_kernel<T>, shape, device, mine);
}

template void launch_pair_online(const PairLoss<float>&, const PairPlan&, const Device&);
template void launch_pair_online(const PairLoss<half>&, const PairPlan&, const Device&);
template void launch_pair_online(const PairLoss<bfloat16>&, const PairPlan&, const Device&);
#endif

}  // namespace adamix
