// Whether a backward goes in one pass, and how its tiles are shared out.
#pragma once

#include "common/one_pass.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {

// blocks 0: in two passes.
struct PassPlan {
  int blocks, tiles, tiles_a_block, tiles_a_sample, slots;
  int cluster;  // blocks that join their sums, where a device can
  bool keeps;   // the weights, in shared memory
  int64_t planes_size;
  // Floats of all planes, and of the numbers of their experts behind them.
  int64_t planes() const { return static_cast<int64_t>(blocks) * 2 * slots * planes_size; }
  int64_t floats() const { return planes() + static_cast<int64_t>(blocks) * 2 * slots; }
};

// Shared memory of the launch that adds the planes: their list, and a sum a thread.
inline size_t pass_sum_bytes(int blocks, int slots) {
  size_t list = (static_cast<size_t>(blocks) * slots + 1) * sizeof(int);
  return (list + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment + kPassSumThreads * sizeof(Piece<float>);
}

// Every sample has one expert a side: ids of samples, or none. Blocks take as many tiles as fill the multiprocessors
// once, so that few planes are written; where samples hold a multiple of that, a block sees one expert a side.
template <typename T>
PassPlan pass_plan(int64_t batch, int64_t tokens, int64_t hidden, int64_t rank, const Routing& down, const Routing& up,
                   bool biases, const Device& device) {
  constexpr int kMostWarps = kPassThreads / 32;
  auto of_samples = [&](const Routing& routing) {
    return routing.ids == nullptr || static_cast<int64_t>(routing.rows_per_id.by) == tokens;
  };
  int64_t warps = hidden / kPassCols;
  if (kFragmentsFrom<T> == 0 || device.capability < 80 || rank == 0 || rank > kFragmentRanks || rank % 4 != 0 ||
      hidden % kPassCols != 0 || warps < 4 || warps > kMostWarps || batch == 0 || tokens < kFragmentRows / 2 ||
      !of_samples(down) || !of_samples(up)) {
    return {};
  }
  PassPlan plan{};
  plan.tiles_a_sample = static_cast<int>((tokens + kFragmentRows - 1) / kFragmentRows);
  int64_t tiles = batch * plan.tiles_a_sample;
  int64_t a_block = (tiles + device.multiprocessors - 1) / device.multiprocessors;
  // Where samples are many and short, planes would be most of what moves: whole samples a block.
  bool many = 3 * batch >= device.multiprocessors && 4 * a_block < rank;
  if (many && a_block < plan.tiles_a_sample) a_block = plan.tiles_a_sample;
  int64_t samples =
      plan.tiles_a_sample % a_block == 0 ? 1 : (a_block + plan.tiles_a_sample - 2) / plan.tiles_a_sample + 1;
  int64_t experts = down.experts > up.experts ? down.experts : up.experts;
  plan.tiles = static_cast<int>(tiles);
  plan.tiles_a_block = static_cast<int>(a_block);
  plan.blocks = static_cast<int>((tiles + a_block - 1) / a_block);
  // Blocks without tiles may fill up the last cluster.
  plan.cluster = device.capability < 90 ? 1 : 4;
  while (round_up(plan.blocks, plan.cluster) > device.multiprocessors) plan.cluster /= 2;
  plan.blocks = round_up(plan.blocks, plan.cluster);
  plan.slots = static_cast<int>(samples < experts ? samples : experts);
  plan.planes_size = rank * hidden + (biases ? hidden : 0);
  auto fits = [&](bool keeps) {
    return shared_bytes<PassMemory<T>>(static_cast<int>(warps), plan.slots, plan.tiles_a_block, keeps) <=
               static_cast<size_t>(device.shared_bytes) &&
           pass_sum_bytes(plan.blocks, plan.slots) <= static_cast<size_t>(device.shared_bytes);
  };
  plan.keeps = fits(true);
  // Planes that nobody would want: of many experts, small samples.
  bool large = plan.planes() > 2 * batch * tokens * hidden;
  return large || !(plan.keeps || fits(false)) ? PassPlan{} : plan;
}

// What both launches know from the plan; planes: plan.floats() of them.
template <typename T>
void follow(const PassPlan& plan, float* planes, int64_t tokens, int64_t hidden, int64_t rank, OnePass<T>& pass,
            PassSum<T>& sum) {
  pass.planes = planes;
  pass.experts = reinterpret_cast<int*>(planes + plan.planes());
  pass.planes_size = plan.planes_size;
  pass.slots = plan.slots;
  pass.tokens = static_cast<int>(tokens);
  pass.tiles = plan.tiles;
  pass.tiles_a_block = plan.tiles_a_block;
  pass.tiles_a_sample = divisor(plan.tiles_a_sample);
  pass.hidden = static_cast<int>(hidden);
  pass.rank = static_cast<int>(rank);
  sum.planes = pass.planes;
  sum.experts = pass.experts;
  sum.planes_size = plan.planes_size;
  sum.blocks = plan.blocks;
  sum.slots = plan.slots;
  sum.hidden = pass.hidden;
  sum.rank = pass.rank;
  sum.down_scale = sum.up_scale = 1.f;
}

}  // namespace adamix
#endif
