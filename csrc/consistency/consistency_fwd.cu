// Losses, statistics and gradients of row pairs in shared memory: every logit is read once. What does not fit is read
// where it lies, twice, or three times for the full gradient.
//
// A thread copies the pieces that it alone reads, so its own wait is all that it needs, and the next row's piece is
// on its way as soon as this row's has been used. A row is walked three times: for its maxima, its sums, its gradient.
#include "common/shared_memory.h"
#include "consistency/pair_share.h"
#include "consistency/pair_team.h"

namespace adamix {

// A row, and where it and its gradients lie, in elements: a pointer out of shared memory could lead anywhere. One warp
// finds the next row of a block's while another joins the sums.
template <typename T>
struct alignas(16) PairNext {
  int64_t a, b, da, db;
  PairRow<T> row;
  bool fits;  // both gradients lie as the logits do

  ADAMIX_DEVICE PairNext(const PairLoss<T>& p, int number) : row(p.a, p.b, p.sums, number, p.classes) {
    a = row.a - p.a.data, b = row.b - p.b.data;
    da = row.live && p.da.data != nullptr ? row_offset(p.da, number) : 0;
    db = row.live && p.db.data != nullptr ? row_offset(p.db, number) : 0;
    fits = (p.da.data == nullptr || row.fits(p.da.data + da)) && (p.db.data == nullptr || row.fits(p.db.data + db));
  }
  ADAMIX_DEVICE PairRow<T> found(const PairLoss<T>& p) const {
    PairRow<T> same = row;
    same.a = p.a.data + a, same.b = p.b.data + b;
    ADAMIX_IS_GLOBAL(same.a);
    ADAMIX_IS_GLOBAL(same.b);
    return same;
  }
};

template <typename T>
struct PairTile {
  static_assert(sizeof(PairNext<T>) <= 2 * kPairBlockThreads / 4 * sizeof(float), "they share their memory");

  PairScratch scratch;  // before what is as large as the launch says: its places are constants
  PairNext<T>* next;    // where only rows of less than a block have their sums
  Piece<T>* pieces;     // [teams, 2, slots]

  template <typename Memory>
  ADAMIX_BOTH PairTile(Memory& memory, int teams, int slots)
      : scratch(memory),
        next(reinterpret_cast<PairNext<T>*>(scratch.teams)),
        pieces(memory.template take<Piece<T>>(teams * 2 * slots)) {}
};

// A thread's sums, and whether they had to be taken with care. fresh: the tail's are not among them yet.
template <bool Full, typename T, int Lanes, int Threads>
ADAMIX_DEVICE bool settle(const PairShare<T, Lanes, Threads>& share, const PairRow<T>& row, PairStatistics& s,
                          bool totals, bool fresh, bool tails) {
  share.template sums<Full, false>(row, s, totals, fresh);
  if (s.finite()) return false;
  s.start(s.top_a, s.top_b);
  share.template sums<Full, true>(row, s, totals, tails);
  return true;
}

// Threads: of a block that holds its rows, as a constant; 0: what PairShare says.
template <typename T, int Lanes, int Threads>
__global__ void __launch_bounds__(Threads > 0 ? Threads : threads_of(Lanes),
                                  Lanes == 32 ? 4 : kPairBlockThreads / (Threads > 0 ? Threads : kPairBlockThreads))
    pair_loss_kernel(PairLoss<T> p) {
  constexpr int kTeams = Lanes == 0 ? 1 : threads_of(Lanes) / Lanes;
  SharedMemory memory;
  PairTile<T> tile(memory, kTeams, p.slots);
  using Share = PairShare<T, Lanes, Threads>;
  int team = Lanes == 0 ? 0 : threadIdx.x / Share::threads(), cluster = Lanes == 0 ? cluster_size() : 1;
  int group = blockIdx.x / cluster, groups = gridDim.x / cluster, turn = 0;
  Share share{};
  share.a = tile.pieces + team * 2 * p.slots, share.b = share.a + p.slots;
  share.lane = Lanes == 0 ? threadIdx.x : threadIdx.x % Share::threads();
  share.first = Lanes == 0 ? cluster_rank() * p.slots : 0, share.held = p.slots;
  bool gradients = p.da.data != nullptr || p.db.data != nullptr, totals = p.smoothing > 0.f;
  float entropy_sum = 0.f, pair_sum = 0.f;

  int tiles = (p.sums.rows + kTeams - 1) / kTeams;
  PairNext<T> taken(p, group * kTeams + team);
  PairRow<T> row = taken.row;
  int64_t at_a = taken.da, at_b = taken.db;
  bool fits = taken.fits;
  share.copy(row);
  copy_commit();
  if (Lanes == 0 && threadIdx.x == 0) tile.scratch.slopes->next_label = 0.f;
  PairScales scales{0.f, 0.f};
  if (p.counts) scales = find_scales(p.sums, tile.scratch);
  if (p.counts && blockIdx.x == 0 && threadIdx.x == 0) store_scales(p.sums, scales);
  PairScales shares = shares_of(p.sums, scales, p.expected);
  if (cluster > 1) cluster_arrive(), cluster_wait();  // others may not run yet

  for (int number = group; number < tiles; number += groups) {
    bool tails = Share::kTails && row.pieces > p.slots * cluster;
    share.take(row, tails);
    ADAMIX_IS_GLOBAL(row.a);
    ADAMIX_IS_GLOBAL(row.b);
    copy_wait<0>();

    PairStatistics s;
    float top_a, top_b, label_a = 0.f, label_b = 0.f;
    share.tops(row, tails && p.full, top_a, top_b);
    float columns = 0.f;
    if (tails && !p.full) {
      // From the maxima of what is held the tail's seldom rise: a rise rounds.
      join_tops<Lanes>(top_a, top_b, tile.scratch, Share::threads() / 32);
      __syncthreads();
      s.start(top_a, top_b);
      columns = share.rising_sums(row, s, totals);
      top_a = s.top_a, top_b = s.top_b;
    }
    join_tops<Lanes>(top_a, top_b, tile.scratch, Share::threads() / 32);
    if (tails && !p.full) {
      s.move_to(top_a, top_b, columns);
    } else {
      s.start(top_a, top_b);
    }
    // The full gradient's d has the rounding that its mean has, so its maxima are the whole row's.
    if (cluster > 1 && p.full) {
      if (threadIdx.x < 32) send_share(s, tile.scratch, turn);
      cluster_arrive(), cluster_wait();
      take_tops(s.top_a, s.top_b, tile.scratch, turn);
      turn ^= 1;
    }
    bool careful;
    if (p.full) {
      careful = settle<true>(share, row, s, totals, tails, tails);
    } else {
      careful = settle<false>(share, row, s, totals, false, tails);
    }
    bool labelled = share.find_label(row, label_a, label_b);
    if (labelled) (Lanes == 0 ? tile.scratch.slopes->next_label : s.label) = label_a;

    // One warp of a block adds up what all have found.
    bool adds = Lanes != 0 || threadIdx.x < 32;
    if constexpr (Lanes == 0) {
      leave_share(s, tile.scratch);
      __syncthreads();
      if (adds) join_warps(s, tile.scratch), s.label = tile.scratch.slopes->next_label;
      if (cluster > 1) {
        if (adds) send_share(s, tile.scratch, turn);
        cluster_arrive();
      }
    } else {
      join_lanes<Lanes>(s);
    }
    auto find_next = [&] {
      return PairNext<T>(p, tiles - number > groups ? (number + groups) * kTeams + team : p.sums.rows);
    };
    if constexpr (Lanes == 0) {
      if (threadIdx.x == 32) *tile.next = find_next();
    } else {
      taken = find_next();
    }
    if (cluster > 1) {
      cluster_wait();
      if (adds) {
        take_shares(s, tile.scratch, turn, [&](int rank) {
          int begin = row.column(rank * p.slots), end = row.column((rank + 1) * p.slots);
          begin = begin < 0 ? 0 : begin, end = end < p.classes ? end : p.classes;
          return begin < end ? static_cast<float>(end - begin) : 0.f;
        });
      }
      turn ^= 1;
    }
    PairSlopes slopes;
    if (adds) {
      PairResult result = result_of(s, row.flags, p.classes, p.smoothing);
      entropy_sum += result.entropy, pair_sum += result.pair;
      if (row.live && share.lane == 0 && share.first == 0) store_row(p, row.row, result);
      slopes = PairSlopes(result, row.flags.counted ? shares.entropy : 0.f, shares.pair, p.rest);
      if (p.full) slopes.settle();
    }
    if constexpr (Lanes == 0) {
      // All lanes have read next_label.
      if (threadIdx.x < 32) __syncwarp();
      if (threadIdx.x == 0) *tile.scratch.slopes = slopes;
      __syncthreads();
      slopes = *tile.scratch.slopes, taken = *tile.next;
    }
    const PairRow<T> next = taken.found(p);

    T *da = p.da.data == nullptr ? nullptr : p.da.data + at_a, *db = p.db.data == nullptr ? nullptr : p.db.data + at_b;
    if (!gradients) {
      share.copy(next);
    } else if (!row.flags.selected) {
      if (row.live) {
        share.clear(da, p.classes, tails);
        share.clear(db, p.classes, tails);
      }
      share.copy(next);
    } else {
      if (p.full) {
        if constexpr (Lanes != 4) careful = __any_sync(0xffffffffu, careful);
        share.template gradients<true>(row, slopes, da, db, fits, careful, next);
      } else {
        share.template gradients<false>(row, slopes, da, db, fits, false, next);
      }
      // The label's column anew, once no other lane may write it.
      if constexpr (Lanes != 4) __syncwarp();
      if (labelled && da != nullptr) {
        float target = 1.f - p.smoothing + p.rest;
        da[row.flags.label] = from_float<T>(p.full ? slopes.template label<T, true>(label_a, label_b, target)
                                                   : slopes.template label<T, false>(label_a, label_b, target));
      }
    }
    copy_commit();
    row = next, at_a = taken.da, at_b = taken.db, fits = taken.fits;
  }
  store_sums<Lanes>(p.sums, scales, tile.scratch, entropy_sum, pair_sum, group, groups);
}

#define ADAMIX_INSTANTIATE(T)                                      \
  template __global__ void pair_loss_kernel<T, 0, 0>(PairLoss<T>); \
  template __global__ void pair_loss_kernel<T, 4, 0>(PairLoss<T>); \
  template __global__ void pair_loss_kernel<T, 32, 0>(PairLoss<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
template __global__ void pair_loss_kernel<half, 0, 128>(PairLoss<half>);
template __global__ void pair_loss_kernel<half, 0, 256>(PairLoss<half>);
template __global__ void pair_loss_kernel<half, 0, 512>(PairLoss<half>);
template __global__ void pair_loss_kernel<bfloat16, 0, 128>(PairLoss<bfloat16>);
template __global__ void pair_loss_kernel<bfloat16, 0, 256>(PairLoss<bfloat16>);
template __global__ void pair_loss_kernel<bfloat16, 0, 512>(PairLoss<bfloat16>);
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
// Whether a plan holds less than a row may have.
template <typename T>
static bool has_tails(const PairLoss<T>& params, const PairPlan& plan) {
  return static_cast<int64_t>(plan.slots) * plan.cluster < pieces_of(params.classes, Piece<T>::kSize);
}

template <typename T, int Lanes, int Threads = 0>
static void launch_rows(const PairLoss<T>& params, const PairPlan& plan, const Device& device) {
  int teams = Lanes == 0 ? 1 : threads_of(Lanes) / Lanes;
  bool tails = has_tails(params, plan);
  const char* name = tails ? "consistency_tail" : plan.cluster > 1 ? "consistency_cluster" : "consistency";
  Shape shape{dim3(static_cast<unsigned>(plan.groups * plan.cluster)), plan.threads,
              shared_bytes<PairTile<T>>(teams, plan.slots), plan.cluster};
  launch(name, pair_loss_kernel<T, Lanes, Threads>, shape, device, params);
}

template <typename T>
void launch_pair_loss(PairLoss<T> params, const PairPlan& plan, const Device& device) {
  params.slots = plan.slots;
  if (plan.lanes == 4) return launch_rows<T, 4>(params, plan, device);
  if (plan.lanes == 32) return launch_rows<T, 32>(params, plan, device);
  if constexpr (sizeof(T) == 2) {
    if (!has_tails(params, plan)) {
      if (plan.threads == 128) return launch_rows<T, 0, 128>(params, plan, device);
      if (plan.threads == 256) return launch_rows<T, 0, 256>(params, plan, device);
      return launch_rows<T, 0, 512>(params, plan, device);
    }
  }
  launch_rows<T, 0>(params, plan, device);
}

template void launch_pair_loss(PairLoss<float>, const PairPlan&, const Device&);
template void launch_pair_loss(PairLoss<half>, const PairPlan&, const Device&);
template void launch_pair_loss(PairLoss<bfloat16>, const PairPlan&, const Device&);

template <typename T>
static const void* cluster_kernel() {
  return reinterpret_cast<const void*>(pair_loss_kernel < T, 0, sizeof(T) == 2 ? kPairBlockThreads : 0 >);
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

int pair_loss_threads(int lanes) { return threads_of(lanes); }

// float and the other types are alike in this.
size_t pair_loss_bytes(int lanes, int slots) {
  return shared_bytes<PairTile<float>>(lanes == 0 ? 1 : threads_of(lanes) / lanes, slots);
}
#endif

}  // namespace adamix
