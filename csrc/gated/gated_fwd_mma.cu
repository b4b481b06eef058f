// The forward with gates where rows are 16-byte pieces: x and base are read once, whatever number of experts there is,
// and no operand but what is narrow passes through shared memory. As routed_lora/routed_lora_fwd_mma.cu.
#include "gated/gated_forward_team.h"

namespace adamix {

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, 2) gated_forward_mma_kernel(GatedForward<T> p) {
  if constexpr (kHasFragments<T>) {
    SharedMemory memory;
    LaneRows at(p.rows);
    GatedTeam<T> team(memory, p);
    int ranks = p.ranks(), down_cols = p.gates.down.experts * ranks;
    team.narrow.clear(at);
    team.table.fill(p.gates, at);
    for (int col0 = 0; col0 < down_cols; col0 += kChunkRanks) {
      multiply_down(p, team, at, col0, down_cols, NoMore{});
      __syncthreads();
      add_down(p, team, at, col0, down_cols);
      __syncthreads();
    }
    poison_team(team.table, at, p.t, p.gates.down.slots * ranks);
    mix_team(p, team, at);
    __syncthreads();
    multiply_up(p, team, at);
  }
}

template __global__ void gated_forward_mma_kernel<half>(GatedForward<half>);
template __global__ void gated_forward_mma_kernel<bfloat16>(GatedForward<bfloat16>);

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
bool launch_gated_forward_mma(const GatedForward<T>& params, const Device& device) {
  bool pieces = params.x.aligned && params.out_aligned && (params.base.data == nullptr || params.base.aligned);
  if (!pieces || !team_fits(params, params.up_bias != nullptr, device)) return false;
  if (launch_gated_resident_forward(params, device)) return true;
  size_t bytes = shared_bytes<GatedTeam<T>>(params);
  if (bytes > static_cast<size_t>(device.shared_bytes)) return false;
  dim3 grid(static_cast<unsigned>((params.rows + kTeamRows - 1) / kTeamRows));
  launch("gated_forward_mma", gated_forward_mma_kernel<T>, {grid, kTeamThreads, bytes}, device, params);
  return true;
}

template bool launch_gated_forward_mma(const GatedForward<half>&, const Device&);
template bool launch_gated_forward_mma(const GatedForward<bfloat16>&, const Device&);
#endif

}  // namespace adamix
