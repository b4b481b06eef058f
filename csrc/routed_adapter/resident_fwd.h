// The forward on tiles that stay in registers, for 16-bit rows that start at multiples of 16 bytes.
#pragma once

#include "routed_adapter/resident_tile.h"
#include "routed_adapter/routed_adapter.h"

namespace adamix {

template <typename T, int Groups, int Chunks, int Steps>
__global__ void __launch_bounds__(kResidentThreads) routed_adapter_resident_forward_kernel(RoutedAdapterForward<T> p) {
  if constexpr (kHasFragments<T>) {
    SharedMemory shared;
    ResidentMemory<T, Groups> memory(shared, blockDim.x / 32, p.rank);
    ResidentTile<T, Groups, Chunks> tile;
    tile.place(p.rows);
    tile.load(p.x);
    ResidentExperts experts;
    experts.find(memory, tile.kRows, static_cast<int>(tile.first), tile.count, p.down, p.up);
    int64_t bank_size = static_cast<int64_t>(p.rank) * p.hidden;

    for (int expert = -1;;) {
      expert = experts.next(experts.narrow, experts.first_narrow, tile.kRows, expert);
      if (expert == kNoExpert) break;
      ResidentBank<T> bank{p.down_weight + expert * bank_size, p.hidden, p.rank};
      const T* bias = p.down_bias == nullptr ? nullptr : p.down_bias + static_cast<int64_t>(expert) * p.rank;
      for (int rank0 = 0; rank0 < p.rank; rank0 += kFragmentRanks) {
        tile.template narrow_part<true>(memory, bank, rank0);
        __syncthreads();
        tile.join_parts(memory, rank0, [&](int row, int rank, float low, float high, uint32_t* word) {
          if (experts.mixed && experts.narrow[row] != expert) return;
          if (rank >= p.rank) {
            *word = 0;  // whatever the sums: columns without weights may hold 0 times infinity
            return;
          }
          if (bias != nullptr) low += to_float(bias[rank]), high += to_float(bias[rank + 1]);
          uint32_t pre = word_of<T>(low, high);
          *reinterpret_cast<uint32_t*>(p.pre + (tile.first + row) * p.rank + rank) = pre;
          *word = word_of<T>(activate(p.activation, low_of<T>(pre)), activate(p.activation, high_of<T>(pre)));
        });
        __syncthreads();
      }
    }

    auto add = [&](int expert) {
      ResidentBank<T> bank{p.up_weight + expert * bank_size, p.hidden, p.rank};
      const T* bias = p.up_bias == nullptr ? nullptr : p.up_bias + static_cast<int64_t>(expert) * p.hidden;
      tile.template wide<true, Steps>(memory, bank, bias, p.out,
                                      experts.template rows_of_wide<tile.kRows>(expert, tile.count));
    };
    if (experts.one() && p.residual.data == p.x.data) return add(experts.first_wide);
    if (p.residual.data == nullptr) {
      tile.clear();
    } else if (p.residual.data != p.x.data) {
      tile.load(p.residual);
    }
    for (int expert = -1;;) {
      expert = experts.next(experts.wide, experts.first_wide, tile.kRows, expert);
      if (expert == kNoExpert) break;
      add(expert);
    }
    tile.poison(experts, p.pre, p.rank);
    tile.poison(experts, p.out, p.hidden);
  }
}

}  // namespace adamix
