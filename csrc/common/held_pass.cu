// The kernel of held_pass.h: a block walks its tiles, and leaves its sums where an expert changes.
#include "common/held_pass_block.h"
#include "common/one_pass_plan.h"

namespace adamix {

// Where a block's sums go.
template <typename T, bool Lora>
struct HeldPassPlanes {
  HeldPassBlock<T, Lora>& block;
  int64_t plane0;  // of the block
  PassSlots down, up;

  ADAMIX_DEVICE explicit HeldPassPlanes(HeldPassBlock<T, Lora>& of)
      : block(of), plane0(static_cast<int64_t>(blockIdx.x) * 2 * of.p.slots) {
    const OnePass<T>& p = of.p;
    down = {of.memory.slots, p.planes + plane0 * p.planes_size, p.planes_size};
    up = {of.memory.slots + p.slots, p.planes + (plane0 + p.slots) * p.planes_size, p.planes_size};
  }

  // The biases' sums lie behind the weights' in a plane.
  ADAMIX_DEVICE float* bias_of(float* plane) const {
    return plane + static_cast<int64_t>(block.p.rank) * block.p.hidden;
  }
  ADAMIX_DEVICE void flush_down() const {
    if (block.down_now == kNoExpert || !block.p.need_down) return;
    down.flush(block.down_now, [&](float* plane, bool fresh) {
      block.leave(plane, fresh, block.of_down);
      if constexpr (!Lora) block.leave_down_bias(bias_of(plane), fresh);
    });
    block.clear(block.of_down);
  }
  ADAMIX_DEVICE void flush_up() const {
    if (block.up_now == kNoExpert || !block.p.need_up) return;
    up.flush(block.up_now, [&](float* plane, bool fresh) {
      block.leave(plane, fresh, block.of_up);
      if constexpr (!Lora) block.leave_up_bias(bias_of(plane), fresh);
    });
    block.clear(block.of_up);
  }
};

template <typename T, bool Lora>
__global__ void __launch_bounds__(kPassThreads) held_one_pass_kernel(OnePass<T> p) {
#if ADAMIX_ARCH < 750
  SharedMemory shared;
  HeldPassMemory<T> memory(shared, blockDim.x / 32, p.slots);
  HeldPassBlock<T, Lora> block(p, memory);
  HeldPassPlanes<T, Lora> planes(block);
  for (int i = threadIdx.x; i < 2 * p.slots; i += blockDim.x) memory.slots[i] = kNoExpert;
  int begin = static_cast<int>(blockIdx.x) * p.tiles_a_block;
  int end = p.tiles - begin < p.tiles_a_block ? p.tiles : begin + p.tiles_a_block;
  PassTile at = block.place(begin);
  block.fetch(p.grad_out, at);
  block.take();
  __syncthreads();
  int down = p.down.expert(at.first), up = p.up.expert(at.first);
#pragma unroll 1
  for (int tile = begin;;) {
    bool served = down != kNoExpert && up != kNoExpert;
    if (served) {
      if (down != block.down_now) {
        planes.flush_down();
        block.take_weights(down);
      }
      if (up != block.up_now) planes.flush_up();
      block.down_now = down, block.up_now = up;
      if (p.need_down) block.fetch(p.x, at);
      block.narrow(at);
      block.add_up();
      block.wide(at);
      if (p.need_down) {
        block.drop();
        block.take();
      }
    } else {
      block.poison(at);
    }
    bool last = ++tile == end;
    int sample = at.sample;
    if (!last) {
      at = block.place(tile);
      block.fetch(p.grad_out, at);
    }
    if (served) block.add_down();
    if (last) break;
    block.take();
    if (at.sample != sample) down = p.down.expert(at.first), up = p.up.expert(at.first);
  }
  planes.flush_down();
  planes.flush_up();
  for (int i = threadIdx.x; i < 2 * p.slots; i += blockDim.x) p.experts[planes.plane0 + i] = memory.slots[i];
#endif
}

template __global__ void held_one_pass_kernel<half, false>(OnePass<half>);
template __global__ void held_one_pass_kernel<half, true>(OnePass<half>);

#if defined(ADAMIX_LAUNCHERS)
template <bool Lora, typename T>
void launch_held_pass(const OnePass<T>& params, const PassPlan& plan, const Device& device) {
  int warps = params.hidden / kPassCols;
  launch("held_one_pass", held_one_pass_kernel<T, Lora>,
         {dim3(plan.blocks), warps * 32, shared_bytes<HeldPassMemory<T>>(warps, params.slots)}, device, params);
}

template void launch_held_pass<false>(const OnePass<half>&, const PassPlan&, const Device&);
template void launch_held_pass<true>(const OnePass<half>&, const PassPlan&, const Device&);
#endif

}  // namespace adamix
