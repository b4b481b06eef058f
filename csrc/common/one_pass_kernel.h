// The kernel of one_pass.h: a block walks its tiles, leaves its sums where an expert changes, and joins the last ones
// with those of its cluster's other blocks.
#pragma once

#include "common/one_pass_block.h"

namespace adamix {

// Where a block's sums go.
template <typename T, bool Lora, bool Keeps>
struct PassPlanes {
  using Block = PassBlock<T, Lora, Keeps>;
  Block& block;
  int64_t plane0;  // of the block
  PassSlots down, up;

  ADAMIX_DEVICE explicit PassPlanes(Block& of) : block(of), plane0(static_cast<int64_t>(blockIdx.x) * 2 * of.p.slots) {
    const OnePass<T>& p = of.p;
    down = {of.memory.slots, p.planes + plane0 * p.planes_size, p.planes_size};
    up = {of.memory.slots + p.slots, p.planes + (plane0 + p.slots) * p.planes_size, p.planes_size};
  }

  // The biases' sums of `blocks` blocks of the cluster, behind the weights' in a plane.
  ADAMIX_DEVICE void leave_bias(float* plane, bool fresh, int count, int blocks) const {
    float* bias = plane + static_cast<int64_t>(block.p.rank) * block.p.hidden;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      float sum = fresh ? 0.f : bias[i];
      for (int other = 0; other < blocks; ++other) {
        sum += blocks > 1 ? *cluster_at(block.memory.sums + i, other) : block.memory.sums[i];
      }
      bias[i] = sum;
    }
  }

  ADAMIX_DEVICE void flush_down() const {
    if (block.down_now == kNoExpert || !block.p.need_down) return;
    if constexpr (!Lora) block.join_down_bias();
    __syncthreads();
    down.flush(block.down_now, [&](float* plane, bool fresh) {
      block.of_down.leave(plane, block.p.rank, block.p.hidden, fresh);
      if constexpr (!Lora) leave_bias(plane, fresh, block.p.rank, 1);
    });
    block.of_down.clear();
  }

  ADAMIX_DEVICE void flush_up() const {
    if (block.up_now == kNoExpert || !block.p.need_up) return;
    if constexpr (!Lora) block.join_up_bias();
    __syncthreads();
    up.flush(block.up_now, [&](float* plane, bool fresh) {
      block.of_up.leave(plane, block.p.rank, block.p.hidden, fresh);
      if constexpr (!Lora) leave_bias(plane, fresh, block.p.hidden, 1);
    });
    block.of_up.clear();
  }

  // The same for what is held at the end: one plane, that of the cluster's first block, where its blocks hold sums of
  // one expert. Every block of the cluster calls.
  ADAMIX_DEVICE void finish() const {
    if (cluster_size() == 1) {
      flush_down();
      flush_up();
      return;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int* held = block.memory.held;
      held[0] = block.p.need_down ? block.down_now : kNoExpert;
      held[1] = held[0] == kNoExpert ? 0 : down.find(held[0]);
      held[2] = block.p.need_up ? block.up_now : kNoExpert;
      held[3] = held[2] == kNoExpert ? 0 : up.find(held[2]);
    }
    cluster_arrive(), cluster_wait();
    join(0, block.of_down, [&] { block.join_down_bias(); }, block.p.rank, [&] { flush_down(); });
    join(1, block.of_up, [&] { block.join_up_bias(); }, block.p.hidden, [&] { flush_up(); });
    cluster_arrive(), cluster_wait();  // others may still read what this block holds
  }

 private:
  template <typename JoinBias, typename Flush>
  ADAMIX_DEVICE void join(int side, const PassSums& sums, JoinBias join_bias, int biases, Flush flush) const {
    const OnePass<T>& p = block.p;
    int blocks = cluster_size(), number = cluster_rank(), *held = block.memory.held + 2 * side;
    int expert = *cluster_at(held, 0), slot = *cluster_at(held + 1, 0);
    bool alike = expert != kNoExpert;
    for (int other = 1; other < blocks; ++other) {
      int theirs = *cluster_at(held, other);
      alike = alike && (theirs == expert || theirs == kNoExpert);
    }
    if (!alike) {
      flush();
      return;
    }
    if constexpr (!Lora) join_bias();
    // The sums lie where the tiles were: every warp has done with them.
    auto place = [&](int n) {
      return reinterpret_cast<Piece<float>*>(block.memory.stages) + n * static_cast<int>(blockDim.x) + threadIdx.x;
    };
#pragma unroll
    for (int n = 0; n < 8; ++n) *place(n) = Piece<float>{{sums.at[n][0], sums.at[n][1], sums.at[n][2], sums.at[n][3]}};
    cluster_arrive(), cluster_wait();
    int* slots = block.memory.slots + side * p.slots;
    bool fresh = *cluster_at(slots + slot, 0) == kNoExpert;
    float* plane = p.planes + (plane0 + (side - 2 * number) * p.slots + slot) * p.planes_size;
    if (blocks == 4) {
      join_tiles<4>(place(number), number, plane, fresh);
    } else {
      join_tiles<2>(place(number), number, plane, fresh);
    }
    if constexpr (!Lora) {
      if (number == 0) leave_bias(plane, fresh, biases, blocks);
    }
    cluster_arrive(), cluster_wait();
    if (number == 0 && threadIdx.x == 0) slots[slot] = expert;
  }

  // The sums of tiles number, number + Blocks and so on of a cluster's blocks, in their order; the first one's at
  // `own`.
  template <int Blocks>
  ADAMIX_DEVICE void join_tiles(Piece<float>* own, int number, float* plane, bool fresh) const {
    const Piece<float>* from[Blocks];
#pragma unroll
    for (int other = 0; other < Blocks; ++other) from[other] = cluster_at(own, other);
#pragma unroll
    for (int i = 0; i < 8 / Blocks; ++i) {
      int step = i * Blocks * static_cast<int>(blockDim.x);
      Piece<float> sum = from[0][step];
#pragma unroll
      for (int other = 1; other < Blocks; ++other) {
        Piece<float> one = from[other][step];
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.values[e] += one.values[e];
      }
      PassSums::leave_tile(plane, block.p.rank, block.p.hidden, fresh, number + i * Blocks, sum);
    }
  }
};

template <typename T, bool Lora, bool Keeps>
ADAMIX_DEVICE void one_pass(const OnePass<T>& p) {
  if constexpr (kHasFragments<T>) {
    SharedMemory shared;
    PassMemory<T> memory(shared, blockDim.x / 32, p.slots, p.tiles_a_block, Keeps);
    PassBlock<T, Lora, Keeps> block(p, memory);
    PassPlanes<T, Lora, Keeps> planes(block);
    PassWeights<T, Keeps, true> up_weights{memory.weights + block.warp * 8 * 32, nullptr, p.hidden, p.rank};
    PassWeights<T, Keeps, false> down_weights{memory.weights + block.warp * 8 * 32 + 4 * 32, nullptr, p.hidden, p.rank};
    int begin = static_cast<int>(blockIdx.x) * p.tiles_a_block;
    int end = p.tiles - begin < p.tiles_a_block ? max_of(begin, p.tiles) : begin + p.tiles_a_block;
    T *stage = block.stages, *other = stage + 2 * PassMemory<T>::kTile;
    PassTile at = block.place(begin);
    if (begin < end) {
      block.seek(at);
      block.load(stage, at);
    }
    copy_commit();
    for (int i = threadIdx.x; i < 2 * p.slots; i += blockDim.x) memory.slots[i] = kNoExpert;
    for (int i = threadIdx.x; i < end - begin; i += blockDim.x) {
      int row = block.place(begin + i).sample * p.tokens;
      memory.experts[2 * i] = p.down.expert(row);
      memory.experts[2 * i + 1] = p.up.expert(row);
    }
    __syncthreads();

    const int* experts = memory.experts;
    for (int left = end - begin; left > 0; --left, experts += 2) {
      PassTile now = at;
      __syncwarp();
      if (left > 1) {
        at = block.after(now);
        if (at.sample != now.sample) block.seek(at);
        block.load(other, at);
      }
      copy_commit();
      T* dy = stage;
      stage = other, other = dy;
      int down = experts[0], up = experts[1];
      if (down == kNoExpert || up == kNoExpert) {
        copy_wait<1>();
        block.poison(now);
        continue;
      }
      if (down != block.down_now) {
        planes.flush_down();
        down_weights.take(p.down_weight, down);
      }
      if (up != block.up_now) {
        planes.flush_up();
        up_weights.take(p.up_weight, up);
      }
      block.down_now = down, block.up_now = up;
      block.narrow(dy, now, up_weights);
      block.wide(dy, now, down_weights);
      block.add(dy);
    }
    planes.finish();
    for (int i = threadIdx.x; i < 2 * p.slots; i += blockDim.x) p.experts[planes.plane0 + i] = memory.slots[i];
  }
}

}  // namespace adamix
