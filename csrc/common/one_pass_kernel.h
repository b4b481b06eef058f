// The kernel of one_pass.h: a block walks its tiles, leaves its sums where an expert changes, and joins the last ones
// with those of its cluster's other blocks.
#pragma once

#include "common/dependent_launch.h"
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

  // The block's sums of a side's biases, behind the weights' in a plane.
  ADAMIX_DEVICE void leave_bias(float* plane, bool fresh, const float* sums, int count) const {
    float* bias = plane + static_cast<int64_t>(block.p.rank) * block.p.hidden;
    for (int i = threadIdx.x; i < count; i += blockDim.x) bias[i] = (fresh ? 0.f : bias[i]) + sums[i];
  }

  ADAMIX_DEVICE void flush_down() const {
    if (block.down_now == kNoExpert || !block.p.need_down) return;
    if constexpr (!Lora) block.join_down_bias();
    __syncthreads();
    down.flush(block.down_now, [&](float* plane, bool fresh) {
      block.of_down.leave(plane, block.p.rank, block.p.hidden, fresh);
      if constexpr (!Lora) leave_bias(plane, fresh, block.bias_sums(0), block.p.rank);
    });
    block.of_down.clear();
  }

  ADAMIX_DEVICE void flush_up() const {
    if (block.up_now == kNoExpert || !block.p.need_up) return;
    if constexpr (!Lora) block.join_up_bias();
    __syncthreads();
    up.flush(block.up_now, [&](float* plane, bool fresh) {
      block.of_up.leave(plane, block.p.rank, block.p.hidden, fresh);
      if constexpr (!Lora) leave_bias(plane, fresh, block.bias_sums(1), block.p.hidden);
    });
    block.of_up.clear();
  }

  // The same for what is held at the end: one plane for an expert, that of the first of the cluster's blocks which hold
  // sums of it. Every block of the cluster calls.
  ADAMIX_DEVICE void finish() const {
    if (cluster_size() == 1) {
      flush_down();
      flush_up();
      return;
    }
    __syncthreads();
    int* held = block.memory.held;
    if (threadIdx.x == 0) {
      held[0] = block.p.need_down ? block.down_now : kNoExpert;
      held[1] = held[0] == kNoExpert ? 0 : down.find(held[0]);
      held[2] = block.p.need_up ? block.up_now : kNoExpert;
      held[3] = held[2] == kNoExpert ? 0 : up.find(held[2]);
    }
    if constexpr (!Lora) block.join_down_bias(), block.join_up_bias();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float (&of_down)[4] = block.of_down.at[n], (&of_up)[4] = block.of_up.at[n];
      *place(0, n) = Piece<float>{{of_down[0], of_down[1], of_down[2], of_down[3]}};
      *place(1, n) = Piece<float>{{of_up[0], of_up[1], of_up[2], of_up[3]}};
    }
    cluster_arrive(), cluster_wait();
    if (cluster_size() == 8) {
      join<8>(0), join<8>(1);
    } else if (cluster_size() == 4) {
      join<4>(0), join<4>(1);
    } else {
      join<2>(0), join<2>(1);
    }
    int side = threadIdx.x;
    bool has_plane = side < 2 && is_first(held + 2 * side);
    cluster_arrive(), cluster_wait();  // others may still read what this block holds
    if (has_plane) block.memory.slots[side * block.p.slots + held[2 * side + 1]] = held[2 * side];
    __syncthreads();
  }

 private:
  // Of tile n of a side's sums, where the tiles of the rows were: every warp has done with them.
  ADAMIX_DEVICE Piece<float>* place(int side, int n) const {
    int at = (8 * side + n) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    return reinterpret_cast<Piece<float>*>(block.memory.stages) + at;
  }

  // Whether no block of the cluster before this one holds sums of the same expert.
  ADAMIX_DEVICE bool is_first(int* held) const {
    bool first = *held != kNoExpert;
    for (int other = 0; other < cluster_rank(); ++other) first = first && *cluster_at(held, other) != *held;
    return first;
  }

  // A side's sums of all blocks of the cluster, expert by expert, in the blocks' order: this block's share of columns.
  template <int Blocks>
  ADAMIX_DEVICE void join(int side) const {
    const OnePass<T>& p = block.p;
    int number = cluster_rank(), threads = blockDim.x, *held = block.memory.held + 2 * side;
    int experts[Blocks];
    Piece<float> parts[8 / Blocks][Blocks];
#pragma unroll
    for (int other = 0; other < Blocks; ++other) {
      experts[other] = *cluster_at(held, other);
      const Piece<float>* from = cluster_at(place(side, number), other);
#pragma unroll
      for (int i = 0; i < 8 / Blocks; ++i) parts[i][other] = from[i * Blocks * threads];
    }
    unsigned left = 0;  // blocks whose sums are in no plane yet
#pragma unroll
    for (int other = 0; other < Blocks; ++other) left |= (experts[other] == kNoExpert ? 0u : 1u) << other;
#pragma unroll 1
    for (int first = 0; left != 0; ++first) {
      if ((left >> first & 1) == 0) continue;
      int expert = *cluster_at(held, first), slot = *cluster_at(held + 1, first);
      bool holds[Blocks];
#pragma unroll
      for (int other = 0; other < Blocks; ++other) {
        holds[other] = experts[other] == expert;
        if (holds[other]) left &= ~(1u << other);
      }
      bool fresh = *cluster_at(block.memory.slots + side * p.slots + slot, first) == kNoExpert;
      float* plane = p.planes + (plane0 + (2 * (first - number) + side) * p.slots + slot) * p.planes_size;
#pragma unroll
      for (int i = 0; i < 8 / Blocks; ++i) {
        Piece<float> sum{};
#pragma unroll
        for (int other = 0; other < Blocks; ++other) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum.values[e] += holds[other] ? parts[i][other].values[e] : 0.f;
        }
        PassSums::leave_tile(plane, p.rank, p.hidden, fresh, number + i * Blocks, sum);
      }
      if constexpr (!Lora) {
        float *bias = plane + static_cast<int64_t>(p.rank) * p.hidden, *sums = block.bias_sums(side);
        for (int i = number * threads + static_cast<int>(threadIdx.x); i < (side == 0 ? p.rank : p.hidden);
             i += Blocks * threads) {
          float sum = fresh ? 0.f : bias[i];
#pragma unroll
          for (int other = 0; other < Blocks; ++other) {
            float one = *cluster_at(sums + i, other);
            sum += holds[other] ? one : 0.f;
          }
          bias[i] = sum;
        }
      }
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
    allow_next_launch();
    planes.finish();
    for (int i = threadIdx.x; i < 2 * p.slots; i += blockDim.x) p.experts[planes.plane0 + i] = memory.slots[i];
  }
}

}  // namespace adamix
