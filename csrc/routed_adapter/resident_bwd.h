// The input's gradient on tiles that stay in registers, for 16-bit rows that start at multiples of 16 bytes.
#pragma once

#include "common/activated.h"
#include "routed_adapter/resident_input_grad.h"
#include "routed_adapter/resident_tile.h"

namespace adamix {

template <typename T, int Groups, int Chunks, int Steps>
__global__ void __launch_bounds__(kResidentThreads) routed_adapter_resident_input_grad_kernel(ResidentInputGrad<T> p) {
  if constexpr (kHasFragments<T>) {
    SharedMemory shared;
    ResidentMemory<T, Groups> memory(shared, blockDim.x / 32, p.rank);
    ResidentTile<T, Groups, Chunks> tile;
    tile.place(p.rows);
    tile.load(p.grad_out);
    ResidentExperts experts;
    experts.find(memory, tile.kRows, static_cast<int>(tile.first), tile.count, p.up, p.down);
    int64_t bank_size = static_cast<int64_t>(p.rank) * p.hidden;

    for (int expert = -1;;) {
      expert = experts.next(experts.narrow, experts.first_narrow, tile.kRows, expert);
      if (expert == kNoExpert) break;
      ResidentBank<T> bank{p.up_weight + expert * bank_size, p.hidden, p.rank};
      for (int rank0 = 0; rank0 < p.rank; rank0 += kFragmentRanks) {
        tile.template narrow_part<false>(memory, bank, rank0);
        __syncthreads();
        tile.join_parts(memory, rank0, [&](int row, int rank, float low, float high, uint32_t* word) {
          if (experts.mixed && experts.narrow[row] != expert) return;
          if (rank >= p.rank) {
            *word = 0;  // whatever the sums: columns without weights may hold 0 times infinity
            return;
          }
          int64_t at = (tile.first + row) * p.rank + rank;
          uint32_t pre = p.pre == nullptr ? 0 : *reinterpret_cast<const uint32_t*>(p.pre + at);
          Activated first = activated(p.activation, low_of<T>(pre)), second = activated(p.activation, high_of<T>(pre));
          *word = word_of<T>(p.scaling * low * first.slope, p.scaling * high * second.slope);
          if (p.dpre != nullptr) *reinterpret_cast<uint32_t*>(p.dpre + at) = *word;
          if (p.h != nullptr) *reinterpret_cast<uint32_t*>(p.h + at) = word_of<T>(first.value, second.value);
        });
        __syncthreads();
      }
    }
    if (p.dx == nullptr) return;

    if (!p.add_input) tile.clear();
    for (int expert = -1;;) {
      expert = experts.next(experts.wide, experts.first_wide, tile.kRows, expert);
      if (expert == kNoExpert) break;
      ResidentBank<T> bank{p.down_weight + expert * bank_size, p.hidden, p.rank};
      tile.template wide<false, Steps>(memory, bank, static_cast<const T*>(nullptr), p.dx,
                                       experts.template rows_of_wide<tile.kRows>(expert, tile.count));
    }
    tile.poison(experts, p.dx, p.hidden);
  }
}

}  // namespace adamix
