// Losses, statistics and gradients of row pairs that fit into shared memory: every logit is read once.
//
// A thread copies the pieces that it alone reads, so its own wait is all that it needs, and the next row's piece is
// on its way as soon as this row's has been used.
#include "common/shared_memory.h"
#include "consistency/pair_row.h"
#include "consistency/pair_team.h"

#if defined(ADAMIX_LAUNCHERS)
#include <algorithm>
#endif

namespace adamix {

template <typename T>
struct PairTile {
  Piece<T>* pieces;  // [teams, 2, slots]
  PairScratch scratch;

  template <typename Memory>
  ADAMIX_BOTH PairTile(Memory& memory, int teams, int slots)
      : pieces(memory.template take<Piece<T>>(teams * 2 * slots)), scratch(memory) {}
};

template <typename T, int Lanes>
__global__ void __launch_bounds__(Lanes == 0 ? kPairBlockThreads : kPairThreads, Lanes == 0 ? 1 : 5)
    pair_loss_kernel(PairLoss<T> p) {
  constexpr int kTeams = Lanes == 0 ? 1 : kPairThreads / Lanes;
  SharedMemory memory;
  PairTile<T> tile(memory, kTeams, p.slots);
  int threads = Lanes == 0 ? static_cast<int>(blockDim.x) : Lanes;
  int team = Lanes == 0 ? 0 : threadIdx.x / threads, lane = threadIdx.x % threads;
  int cluster = Lanes == 0 ? cluster_size() : 1;
  int group = blockIdx.x / cluster, groups = gridDim.x / cluster;
  int first = Lanes == 0 ? cluster_rank() * p.slots : 0;  // of the row's pieces, this block's
  Piece<T>* slot_a = tile.pieces + team * 2 * p.slots;
  Piece<T>* slot_b = slot_a + p.slots;
  bool gradients = p.da.data != nullptr || p.db.data != nullptr;
  PairScales scales{0.f, 0.f};
  if (p.counts) scales = find_scales(p.sums, tile.scratch);
  PairShares shares = shares_of(p.sums, scales);
  float entropy_sum = 0.f, pair_sum = 0.f;

  int tiles = (p.sums.rows + kTeams - 1) / kTeams;
  PairRow<T> row(p.a, p.b, p.sums, group * kTeams + team, p.classes);
  for (int slot = lane; slot < p.slots; slot += threads) {
    if (row.flags.selected && first + slot < row.pieces) row.copy(slot_a + slot, slot_b + slot, first + slot);
  }
  copy_commit();
  for (int number = group; number < tiles; number += groups) {
    bool more = tiles - number > groups;
    PairRow<T> next(p.a, p.b, p.sums, more ? (number + groups) * kTeams + team : p.sums.rows, p.classes);
    copy_wait<0>();

    PairStatistics s;
    s.clear();
    if (row.flags.counted && row.flags.label >= 0) {
      int at = row.head + row.flags.label, slot = at / Piece<T>::kSize - first;
      if (slot >= 0 && slot < p.slots && slot % threads == lane) {
        s.label = to_float(slot_a[slot].values[at % Piece<T>::kSize]);
      }
    }
    for (int slot = lane; slot < p.slots; slot += threads) {
      if (row.flags.selected && first + slot < row.pieces) row.add(s, slot_a[slot], slot_b[slot], first + slot);
      if (!gradients && !p.full && next.flags.selected && first + slot < next.pieces) {
        next.copy(slot_a + slot, slot_b + slot, first + slot);
      }
    }
    join_statistics<Lanes>(s, tile.scratch);
    PairResult result = result_of(s, row.flags, p.classes, p.smoothing);
    if (p.full) {
      PairMeans means{{0.f, 0.f}};
      for (int slot = lane; slot < p.slots; slot += threads) {
        if (row.flags.selected && first + slot < row.pieces) row.add(means, result, slot_a[slot], slot_b[slot]);
        if (!gradients && next.flags.selected && first + slot < next.pieces) {
          next.copy(slot_a + slot, slot_b + slot, first + slot);
        }
      }
      join_means<Lanes>(result, means, row.flags.selected, tile.scratch);
    }
    entropy_sum += result.entropy, pair_sum += result.pair;
    if (row.live && lane == 0 && first == 0) store_row(p, row.row, result);

    if (gradients) {
      T* da = row.live ? place_of(p.da, row.row) : nullptr;
      T* db = row.live ? place_of(p.db, row.row) : nullptr;
      float entropy = row.flags.counted ? shares.entropy : 0.f;
      for (int slot = lane; slot < p.slots; slot += threads) {
        if (first + slot < row.pieces) {
          Piece<T> ga = zeros<T>(), gb = zeros<T>();
          if (row.flags.selected) {
            ga = slot_a[slot], gb = slot_b[slot];
            row.slopes(ga, gb, first + slot, result, entropy, 0.5f * shares.pair, p.smoothing, p.rest, p.full);
          }
          if (da != nullptr) row.write(da, ga, first + slot);
          if (db != nullptr) row.write(db, gb, first + slot);
        }
        if (next.flags.selected && first + slot < next.pieces) {
          next.copy(slot_a + slot, slot_b + slot, first + slot);
        }
      }
    }
    copy_commit();
    row = next;
  }
  store_sums<Lanes>(p.sums, scales, tile.scratch, entropy_sum, pair_sum, group, groups);
  if (cluster > 1) cluster_barrier();  // others may still read this block's shared memory
}

#define ADAMIX_INSTANTIATE(T)                                   \
  template __global__ void pair_loss_kernel<T, 0>(PairLoss<T>); \
  template __global__ void pair_loss_kernel<T, 4>(PairLoss<T>); \
  template __global__ void pair_loss_kernel<T, 32>(PairLoss<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T, int Lanes>
static void launch_rows(const PairLoss<T>& params, const PairPlan& plan, const Device& device) {
  int teams = Lanes == 0 ? 1 : kPairThreads / Lanes;
  Shape shape{dim3(static_cast<unsigned>(plan.groups * plan.cluster)), plan.threads,
              shared_bytes<PairTile<T>>(teams, plan.slots), plan.cluster};
  launch("consistency", pair_loss_kernel<T, Lanes>, shape, device, params);
}

template <typename T>
void launch_pair_loss(PairLoss<T> params, const PairPlan& plan, const Device& device) {
  params.slots = plan.slots;
  params.splits = plan.splits;
  if (plan.splits > 0) return launch_pair_online(params, plan, device);
  if (plan.lanes == 4) return launch_rows<T, 4>(params, plan, device);
  if (plan.lanes == 32) return launch_rows<T, 32>(params, plan, device);
  launch_rows<T, 0>(params, plan, device);
}

template void launch_pair_loss(PairLoss<float>, const PairPlan&, const Device&);
template void launch_pair_loss(PairLoss<half>, const PairPlan&, const Device&);
template void launch_pair_loss(PairLoss<bfloat16>, const PairPlan&, const Device&);

template <typename T>
static const void* cluster_kernel() {
  return reinterpret_cast<const void*>(pair_loss_kernel<T, 0>);
}

template <typename T>
int largest_pair_cluster(const Device& device) {
  return largest_cluster("consistency", cluster_kernel<T>(), kPairBlockThreads, device);
}

template <typename T>
void rule_out_pair_cluster(const Device& device, int cluster) {
  rule_out_cluster(cluster_kernel<T>(), device, cluster);
}

template int largest_pair_cluster<float>(const Device&);
template int largest_pair_cluster<half>(const Device&);
template int largest_pair_cluster<bfloat16>(const Device&);
template void rule_out_pair_cluster<float>(const Device&, int);
template void rule_out_pair_cluster<half>(const Device&, int);
template void rule_out_pair_cluster<bfloat16>(const Device&, int);

PairPlan plan_pairs(int rows, int classes, int element_bytes, const Device& device, int most) {
  int pieces = pieces_of(classes, 16 / element_bytes);
  // float and the other types are alike in this.
  auto fits = [&](int teams, int slots) {
    return static_cast<int64_t>(teams) * 2 * slots <= (1 << 20) &&
           shared_bytes<PairTile<float>>(teams, slots) <= static_cast<size_t>(device.shared_bytes);
  };
  auto groups = [&](int teams, int most) { return std::min((rows + teams - 1) / teams, most); };
  for (int lanes : {4, 32}) {
    int teams = kPairThreads / lanes;
    if (classes > (lanes == 4 ? kPairFewClasses : kPairWarpClasses) || !fits(teams, pieces)) continue;
    return {lanes, kPairThreads, 1, pieces, 0, groups(teams, kPairGroups)};
  }
  for (int cluster = 1; cluster <= most; cluster *= 2) {
    int slots = (pieces + cluster - 1) / cluster;
    if (!fits(1, slots)) continue;
    // Few rows: more blocks each, while there is enough for them to do.
    while (2 * cluster <= most && 2 * cluster * rows <= device.multiprocessors && slots > 2 * kPairBlockThreads) {
      cluster *= 2, slots = (pieces + cluster - 1) / cluster;
    }
    int threads = slots > 4 * 256 ? kPairBlockThreads : slots > 4 * 128 ? 256 : 128;
    return {0, threads, cluster, slots, 0, groups(1, kPairGroups)};
  }
  int splits = rows < device.multiprocessors ? device.multiprocessors / std::max(rows, 1) : 1;
  splits = std::max(1, std::min(splits, pieces / kPairBlockThreads));
  int slots = (pieces + splits - 1) / splits;
  return {0, kPairBlockThreads, 1, slots, (pieces + slots - 1) / slots, groups(1, kPairGroups)};
}
#endif

}  // namespace adamix
