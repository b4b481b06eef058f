// The second launch of one_pass.h, which sums the planes that the first one leaves, and how both are launched.
#pragma once

#include "common/fitting_cluster.h"
#include "common/one_pass_kernel.h"
#include "common/one_pass_plan.h"

namespace adamix {

// Every gradient = the sum of its planes, in the order of the blocks that left them, times its scale; zero where none
// did. Parts: of the planes, summed side by side. Block x has an expert of a side, those of the down side first, and
// block y a part of its sums.
template <int Parts, typename T>
ADAMIX_DEVICE void pass_sum(const PassSum<T>& p) {
  await_launch();
  SharedMemory memory;
  int planes = p.blocks * p.slots;
  int* found = memory.take<int>(planes + 1);
  bool up = static_cast<int>(blockIdx.x) >= p.down_jobs;
  int expert = static_cast<int>(blockIdx.x) - (up ? p.down_jobs : 0), side = up ? p.slots : 0;
  if (threadIdx.x < 32) {
    constexpr int kAhead = 4;  // that a lane asks for before it looks at the first
    int count = 0;
#pragma unroll 1
    for (int from = 0; from < planes; from += kAhead * 32) {
      int plane[kAhead], whose[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        int at = from + 32 * u + static_cast<int>(threadIdx.x);
        plane[u] = at + static_cast<int>(static_cast<uint32_t>(at) / static_cast<uint32_t>(p.slots)) * p.slots + side;
        whose[u] = at < planes ? p.experts[plane[u]] : kNoExpert;
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        bool mine = whose[u] == expert;
        uint32_t all = __ballot_sync(0xffffffffu, mine);
        if (mine) found[1 + count + __popc(all & ((1u << threadIdx.x) - 1))] = plane[u];
        count += __popc(all);
      }
    }
    if (threadIdx.x == 0) found[0] = count;
  }
  __syncthreads();
  constexpr int kSize = Piece<float>::kSize, kPieces = kPassSumThreads / Parts;
  int piece = threadIdx.x % kPieces, part = threadIdx.x / kPieces;
  int at = (static_cast<int>(blockIdx.y) * kPieces + piece) * kSize;
  int weights = p.rank * p.hidden, biases = p.down_bias == nullptr && p.up_bias == nullptr ? 0 : up ? p.hidden : p.rank;
  int count = found[0];
  int a_part = ceil_div(count, Parts), last = count < (part + 1) * a_part ? count : (part + 1) * a_part;
  const float* planes_at = p.planes + at;
  auto planes_size = static_cast<uint32_t>(p.planes_size);
  float sums[kSize] = {};
  if (at < weights + biases) {
#pragma unroll 8
    for (int i = part * a_part; i < last; ++i) {
      uint64_t plane = static_cast<uint64_t>(static_cast<uint32_t>(found[1 + i])) * planes_size;
      Piece<float> one = *reinterpret_cast<const Piece<float>*>(planes_at + plane);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums[e] += one.values[e];
    }
  }
  if constexpr (Parts > 1) {
    float* all = memory.take<float>(kPassSumThreads * kSize);
#pragma unroll
    for (int e = 0; e < kSize; ++e) all[threadIdx.x * kSize + e] = sums[e];
    __syncthreads();
#pragma unroll
    for (int other = 1; other < Parts && part == 0; ++other) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums[e] += all[(other * kPieces + piece) * kSize + e];
    }
  }
  if (part > 0 || at >= weights + biases) return;
  T* weight = up ? p.up_weight : p.down_weight;
  T* bias = up ? p.up_bias : p.down_bias;
  // Weights and ranks are multiples of kSize, columns too: a piece is of weights or of a bias, and of one rank.
  bool is_bias = at >= weights;
  int place = at;  // in the bias, or in the expert's weights
  if (is_bias) {
    place -= weights;
  } else if (up) {
    int rank = static_cast<int>(static_cast<uint32_t>(at) / static_cast<uint32_t>(p.hidden));
    place = (at - rank * p.hidden) * p.rank + rank;
  }
  T* to = is_bias ? bias + (static_cast<int64_t>(expert) * biases + place)
                  : weight + (static_cast<int64_t>(expert) * weights + place);
  float scale = up ? p.up_scale : p.down_scale;
#pragma unroll
  for (float& sum : sums) sum *= scale;
  if (!up || is_bias) {
    store_words(to, TwoWords{{word_of<T>(sums[0], sums[1]), word_of<T>(sums[2], sums[3])}});
    return;
  }
#pragma unroll
  for (int e = 0; e < kSize; ++e) to[e * p.rank] = from_float<T>(sums[e]);
}

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_one_pass(const char* name, void (*kernel)(OnePass<T>), const OnePass<T>& params, const PassPlan& plan,
                     const Device& device) {
  int warps = params.hidden / kPassCols;
  Shape shape{dim3(plan.blocks), warps * 32,
              shared_bytes<PassMemory<T>>(warps, params.slots, params.tiles_a_block, plan.keeps)};
  const void* any = reinterpret_cast<const void*>(kernel);
  // As large as they may be: a plane is written for a cluster.
  int most = plan.cluster == 4 && plan.blocks % 8 == 0 ? 8 : plan.cluster;
  shape.cluster = fitting_cluster(name, any, shape.threads, most, plan.blocks, device);
  try {
    launch(name, kernel, shape, device, params);
  } catch (const ClusterError&) {
    rule_out_cluster(any, device, shape.cluster);
    shape.cluster = 1;
    launch(name, kernel, shape, device, params);
  }
}

// down_experts, up_experts: 0 where that side is not wanted.
template <int Parts, typename T>
void launch_pass_sum(const char* name, void (*kernel)(PassSum<T>), PassSum<T> params, int down_experts, int up_experts,
                     const Device& device) {
  constexpr int kBlock = kPassSumThreads / Parts * Piece<float>::kSize;
  params.chunks = ceil_div(static_cast<int>(params.planes_size), kBlock);
  params.down_jobs = down_experts;
  size_t bytes = pass_sum_bytes(params.blocks, params.slots);
  Shape shape{dim3(down_experts + up_experts, params.chunks), kPassSumThreads, bytes};
  launch_after(name, kernel, shape, device, params);
}
#endif

}  // namespace adamix
