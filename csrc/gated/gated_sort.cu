// Pairs of a row and a slot by expert, in their own order within one: a block lists those of its expert. Where they
// begin follows from how many pairs have lower experts, so that no block waits for another.
#include "common/warp.h"
#include "gated/sorted.h"

namespace adamix {

constexpr int kSortThreads = 512, kSortWarps = kSortThreads / 32;

struct SortCounts {
  int *before, *own;  // of each warp's share of the pairs

  template <typename Memory>
  ADAMIX_BOTH explicit SortCounts(Memory& memory)
      : before(memory.template take<int>(kSortWarps)), own(memory.template take<int>(kSortWarps)) {}
};

// Id: int32_t or int64_t; ByRows: every row has ids of its own.
template <typename Id, bool ByRows>
ADAMIX_DEVICE void list_pairs(const PairSort& p, const SortCounts& counts) {
  const Id* ids = static_cast<const Id*>(p.gates.up.ids);
  int mine = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t experts = p.gates.up.experts;
  int share = round_up(ceil_div(p.pairs, kSortWarps), 32);
  int64_t first = static_cast<int64_t>(warp) * share;
  int from = first < p.pairs ? static_cast<int>(first) : p.pairs, end = p.pairs - from < share ? p.pairs : from + share;
  auto expert_of = [&](int pair) {
    int64_t at = pair;
    if (!ByRows) {
      int row = static_cast<int>(p.by_slots.quotient(pair));
      at = p.gates.at(row) + pair - row * p.gates.slots;
    }
    Id id = ids[at];
    return static_cast<int>(id >= 0 && id < static_cast<Id>(experts) ? id : static_cast<Id>(experts));
  };
  int before = 0, own = 0;
#pragma unroll 8
  for (int pair = from + lane; pair < end; pair += 32) {
    int expert = expert_of(pair);
    before += expert < mine, own += expert == mine;
  }
  before = warp_reduce(before, Add{}), own = warp_reduce(own, Add{});
  if (lane == 0) counts.before[warp] = before, counts.own[warp] = own;
  __syncthreads();
  int place = 0, all = 0, of_warp = own;
  before = 0;
#pragma unroll
  for (int of = 0; of < kSortWarps; ++of) {
    before += counts.before[of], all += counts.own[of];
    if (of < warp) place += counts.own[of];
  }
  int start = round_up(before, kTeamRows) + kTeamRows * mine;
  int* to = p.at + start;
#pragma unroll 8
  for (int pair = of_warp > 0 ? from : end; pair < end; pair += 32) {
    bool found = pair + lane < end && expert_of(pair + lane) == mine;
    uint32_t bits = __ballot_sync(0xffffffffu, found);
    if (bits == 0) continue;
    if (found) to[place + __popc(bits & ((1u << lane) - 1))] = pair + lane;
    place += __popc(bits);
  }
  int next = round_up(before + all, kTeamRows) + kTeamRows * (mine + 1);
  for (int i = start + all + static_cast<int>(threadIdx.x); i < next; i += kSortThreads) p.at[i] = -1;
  if (threadIdx.x == 0 && blockIdx.x < experts) p.edges[2 * mine] = start, p.edges[2 * mine + 1] = start + all;
}

__global__ void __launch_bounds__(kSortThreads) gated_sort_kernel(PairSort p) {
  SharedMemory memory;
  SortCounts counts(memory);
  bool by_rows = p.gates.rows_per_gate.by == 1;
  if (p.gates.up.wide) {
    by_rows ? list_pairs<int64_t, true>(p, counts) : list_pairs<int64_t, false>(p, counts);
  } else {
    by_rows ? list_pairs<int32_t, true>(p, counts) : list_pairs<int32_t, false>(p, counts);
  }
}

#if defined(ADAMIX_LAUNCHERS)
void launch_gated_sort(const PairSort& params, int experts, const Device& device) {
  launch("gated_sort", gated_sort_kernel, {dim3(experts + 1), kSortThreads, shared_bytes<SortCounts>()}, device,
         params);
}
#endif

}  // namespace adamix
