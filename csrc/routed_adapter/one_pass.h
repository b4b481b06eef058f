// The whole backward in one pass over x and grad_out, for at most 16 ranks and one expert a side in every sample.
//
// A block walks tiles of 16 rows, each of one sample. Its warps have 64 columns each, of the tile and of both weight
// gradients, whose sums stay in registers until the expert changes; a second launch adds up what the blocks leave.
#pragma once

#include "common/activation.h"
#include "common/cluster.h"
#include "common/copy.h"
#include "routed_adapter/resident_tile.h"

namespace adamix {

constexpr int kPassCols = 64;     // of a warp
constexpr int kPassThreads = 512;  // at most, of a block
constexpr int kPassSumThreads = 256;
constexpr int kPassSumParts = 4;  // of the planes, summed side by side

template <typename T>
struct RoutedAdapterOnePass {
  Rows<const T> grad_out, x;  // [B, S, H]
  const T* pre;               // [N, r]
  const T* down_weight;       // [Md, r, H]
  const T* up_weight;         // [Mu, H, r]
  T* dx;                      // [N, H] or null
  Routing down, up;
  int64_t planes_size;  // of one expert's sums in a plane: [r, H], then the bias
  float* planes;        // [blocks, side, slots, planes_size]
  int* experts;         // [blocks, side, slots]: whose sums a plane holds; kNoExpert: nobody's
  int slots;
  int tokens, tiles, tiles_a_block;
  Divisor tiles_a_sample;
  int hidden, rank;
  Activation activation;
  bool add_input, need_down, need_up;
};

template <typename T>
struct RoutedAdapterPassSum {
  const float* planes;
  const int* experts;
  int64_t planes_size;
  int blocks, slots;      // of the first launch
  int hidden, rank;
  int down_jobs, chunks;  // blocks of this launch for the down side, and for an expert
  T *down_weight, *down_bias, *up_weight, *up_bias;
};

// A warp's two stages of 16 rows of 64 columns of both tensors; a block's sums and narrow tiles.
template <typename T>
struct PassMemory {
  static constexpr int kTile = kFragmentRows * kPassCols;
  T* stages;       // [warps, 2, tensor, kTile]
  float* sums;     // [warps, 16, 16]
  uint32_t* dpre;  // [16, 8]
  uint32_t* h;     // [16, 8]
  float* bias;     // [16, 16]
  int* slots;      // [side, slots]
  int* experts;    // [tiles, side]
  int* held;       // [side, 2]: the expert of the sums held at the end, and its slot
  Words* weights;  // [warps, side, 4, lanes]: right operands, where the weights are kept

  template <typename Memory>
  ADAMIX_BOTH PassMemory(Memory& memory, int warps, int slot_count, int tiles, bool keeps)
      : stages(memory.template take<T>(warps * 4 * kTile)),
        sums(memory.template take<float>(warps * kFragmentRows * kFragmentRanks)),
        dpre(memory.template take<uint32_t>(kFragmentRows * 8)),
        h(memory.template take<uint32_t>(kFragmentRows * 8)),
        bias(memory.template take<float>(kFragmentRows * kFragmentRanks)),
        slots(memory.template take<int>(2 * slot_count)),
        experts(memory.template take<int>(2 * tiles)),
        held(memory.template take<int>(4)),
        weights(memory.template take<Words>(keeps ? warps * 2 * 4 * 32 : 0)) {}
};

// Where 16 bytes of a row lie: neither 8 rows of a piece nor 2 rows of 4 pieces share banks.
ADAMIX_DEVICE int pass_place(int row, int piece) {
  return row * kPassCols + (piece ^ ((row % 2) << 2 | (row / 2 % 4))) * 8;
}

// The sums of 16 ranks (rows) by 64 columns that a warp holds for one side.
struct PassSums {
  float at[8][4];

  ADAMIX_DEVICE void clear() {
#pragma unroll
    for (auto& tile : at) {
#pragma unroll
      for (float& value : tile) value = 0.f;
    }
  }

  // += narrow^T wide over 16 rows. a: narrow, transposed; wide: the warp's tile.
  template <typename T>
  ADAMIX_DEVICE void add(const uint32_t (&a)[4], const T* wide) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b[4];
      load_turned<0>(b, wide, 0, n * 16, [](int row, int piece) { return pass_place(row, piece); });
      multiply<T>(at[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
      multiply<T>(at[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }

  // plane[rank][col] = the sums, or += them.
  ADAMIX_DEVICE void leave(float* plane, int ranks, int cols, bool fresh) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      leave_tile(plane, ranks, cols, fresh, n, Piece<float>{{at[n][0], at[n][1], at[n][2], at[n][3]}});
    }
  }

  // Tile n, 16 ranks by 8 columns, of them.
  static ADAMIX_DEVICE void leave_tile(float* plane, int ranks, int cols, bool fresh, int n, Piece<float> tile) {
    int col = static_cast<int>(threadIdx.x) / 32 * kPassCols + fragment_part() * 2 + 8 * n;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int rank = fragment_row() + 8 * half;
      if (rank >= ranks) continue;
      float* to = plane + static_cast<int64_t>(rank) * cols + col;
      float low = tile.values[2 * half], high = tile.values[2 * half + 1];
      if (!fresh) low += to[0], high += to[1];
      to[0] = low, to[1] = high;
    }
  }
};

// A side's place in the planes of this block.
struct PassSlots {
  int* experts;  // [slots] in shared memory
  float* planes;
  int64_t size;

  // The expert's own slot, or the first free one.
  ADAMIX_DEVICE int find(int expert) const {
    int slot = 0;
    while (experts[slot] != expert && experts[slot] != kNoExpert) ++slot;
    return slot;
  }

  // Calls leave(plane, fresh) with the plane of an expert. All threads call.
  template <typename Leave>
  ADAMIX_DEVICE void flush(int expert, Leave leave) const {
    int slot = find(expert);
    bool fresh = experts[slot] == kNoExpert;
    leave(planes + slot * size, fresh);
    __syncthreads();
    if (threadIdx.x == 0) experts[slot] = expert;
    __syncthreads();
  }
};

// The weights of a warp's 64 columns as right operands of one side's product, in shared memory or read anew.
template <typename T, bool Keeps, bool Ranks>
struct PassWeights {
  Words* kept;  // [4, lanes] of a warp

  ADAMIX_DEVICE static void load(uint32_t (&w)[4][2], const ResidentBank<T>& bank, int c, int col0) {
    if constexpr (Ranks) {
      bank.load_cols(w, fragment_part() * 4, col0 - fragment_part() * 8 + c * kFragmentCols);
    } else {
      bank.load_rows(w, 0, col0 + c * kFragmentCols);
    }
    transpose_words(w);
  }

  // A lane reads what it has written alone.
  ADAMIX_DEVICE void keep(const ResidentBank<T>& bank, int col0) const {
    if constexpr (Keeps) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        uint32_t w[4][2];
        load(w, bank, c, col0);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          kept[(2 * c + u) * 32 + threadIdx.x % 32] = Words{{w[0][u], w[1][u], w[2][u], w[3][u]}};
        }
      }
    }
  }

  ADAMIX_DEVICE void get(uint32_t (&w)[4][2], const ResidentBank<T>& bank, int c, int col0) const {
    if constexpr (!Keeps) {
      load(w, bank, c, col0);
      return;
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      Words words = kept[(2 * c + u) * 32 + threadIdx.x % 32];
#pragma unroll
      for (int k = 0; k < 4; ++k) w[k][u] = words.at[k];
    }
  }
};

template <typename T, bool Keeps>
__global__ void __launch_bounds__(kPassThreads) routed_adapter_one_pass_kernel(RoutedAdapterOnePass<T> p) {
  if constexpr (kHasFragments<T>) {
    SharedMemory shared;
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    PassMemory<T> memory(shared, warps, p.slots, p.tiles_a_block, Keeps);
    constexpr int kTile = PassMemory<T>::kTile;
    T* stages = memory.stages + warp * 4 * kTile;
    int64_t plane0 = static_cast<int64_t>(blockIdx.x) * 2 * p.slots;
    PassSlots down_slots{memory.slots, p.planes + plane0 * p.planes_size, p.planes_size};
    PassSlots up_slots{memory.slots + p.slots, p.planes + (plane0 + p.slots) * p.planes_size, p.planes_size};
    for (int i = threadIdx.x; i < 2 * p.slots; i += blockDim.x) memory.slots[i] = kNoExpert;

    int begin = static_cast<int>(blockIdx.x) * p.tiles_a_block;
    int end = p.tiles - begin < p.tiles_a_block ? max_of(begin, p.tiles) : begin + p.tiles_a_block;
    auto place = [&](int tile, int& sample, int& token, int& count) {
      sample = static_cast<int>(p.tiles_a_sample.quotient(tile));
      token = (tile - sample * static_cast<int>(p.tiles_a_sample.by)) * kFragmentRows;
      count = p.tokens - token < kFragmentRows ? p.tokens - token : kFragmentRows;
    };
    auto load = [&](int tile) {
      int sample, token, count;
      place(tile, sample, token, count);
      T* to = stages + tile % 2 * 2 * kTile;
#pragma unroll
      for (int tensor = 0; tensor < 2; ++tensor) {
        const Rows<const T>& from = tensor == 0 ? p.grad_out : p.x;
        if (tensor == 1 && !p.need_down) break;
        const T* base = from.data + sample * from.batch_stride + (token + lane / 8) * from.token_stride +
                        warp * kPassCols + lane % 8 * 8;
#pragma unroll
        for (int i = 0; i < kFragmentRows / 4; ++i) {
          int row = i * 4 + lane / 8;
          T* target = to + tensor * kTile + pass_place(row, lane % 8);
          if (row < count) {
            copy_async(target, base + i * 4 * from.token_stride);
          } else {
            *reinterpret_cast<Words*>(target) = Words{};
          }
        }
      }
    };

    PassSums of_down, of_up;
    of_down.clear(), of_up.clear();
    float up_bias[2][8] = {}, down_bias[2] = {0.f, 0.f};
    int down_now = kNoExpert, up_now = kNoExpert;

    // The biases' sums of the block, in memory.sums; complete after a barrier.
    auto join_down_bias = [&] {
      __syncthreads();
      if (threadIdx.x < 128) {
        memory.bias[threadIdx.x * 2] = down_bias[0];
        memory.bias[threadIdx.x * 2 + 1] = down_bias[1];
      }
      down_bias[0] = down_bias[1] = 0.f;
      __syncthreads();
      if (threadIdx.x >= kFragmentRanks) return;
      float sum = 0.f;
      for (int i = 0; i < kFragmentRows; ++i) sum += memory.bias[i * kFragmentRanks + threadIdx.x];
      memory.sums[threadIdx.x] = sum;
    };
    auto join_up_bias = [&] {
      __syncthreads();
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float sum = up_bias[c][e];
#pragma unroll
          for (int distance = 4; distance < 32; distance *= 2) sum += shuffle_xor(sum, distance);
          int col = warp * kPassCols + c * kFragmentCols + fragment_part() * 8 + e;
          if (fragment_row() == 0) memory.sums[col] = sum;
          up_bias[c][e] = 0.f;
        }
      }
    };
    auto leave_bias = [&](float* plane, bool fresh, int count, int blocks) {
      float* bias = plane + static_cast<int64_t>(p.rank) * p.hidden;
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        float sum = fresh ? 0.f : bias[i];
        for (int other = 0; other < blocks; ++other) {
          sum += blocks > 1 ? *cluster_at(memory.sums + i, other) : memory.sums[i];
        }
        bias[i] = sum;
      }
    };
    auto flush_down = [&] {
      if (down_now == kNoExpert || !p.need_down) return;
      join_down_bias();
      __syncthreads();
      down_slots.flush(down_now, [&](float* plane, bool fresh) {
        of_down.leave(plane, p.rank, p.hidden, fresh);
        leave_bias(plane, fresh, p.rank, 1);
      });
      of_down.clear();
    };
    auto flush_up = [&] {
      if (up_now == kNoExpert || !p.need_up) return;
      join_up_bias();
      __syncthreads();
      up_slots.flush(up_now, [&](float* plane, bool fresh) {
        of_up.leave(plane, p.rank, p.hidden, fresh);
        leave_bias(plane, fresh, p.hidden, 1);
      });
      of_up.clear();
    };

    int64_t bank_size = static_cast<int64_t>(p.rank) * p.hidden;
    int col0 = warp * kPassCols + fragment_part() * 8;
    PassWeights<T, Keeps, true> up_weights{memory.weights + warp * 8 * 32};
    PassWeights<T, Keeps, false> down_weights{memory.weights + warp * 8 * 32 + 4 * 32};
    if (begin < end) load(begin);
    copy_commit();
    for (int i = threadIdx.x; i < end - begin; i += blockDim.x) {
      int row = static_cast<int>(p.tiles_a_sample.quotient(begin + i)) * p.tokens;
      memory.experts[2 * i] = p.down.expert(row);
      memory.experts[2 * i + 1] = p.up.expert(row);
    }
    __syncthreads();
    for (int tile = begin; tile < end; ++tile) {
      __syncwarp();
      if (tile + 1 < end) load(tile + 1);
      copy_commit();
      int sample, token, count;
      place(tile, sample, token, count);
      int first = sample * p.tokens + token;
      int down = memory.experts[2 * (tile - begin)], up = memory.experts[2 * (tile - begin) + 1];
      if (down == kNoExpert || up == kNoExpert) {
        copy_wait<1>();
        if (p.dx == nullptr) continue;
        for (int row = warp; row < count; row += warps) {
          for (int col = lane; col < p.hidden; col += 32) {
            p.dx[static_cast<int64_t>(first + row) * p.hidden + col] = from_float<T>(not_a_number());
          }
        }
        continue;
      }
      ResidentBank<T> down_bank{p.down_weight + down * bank_size, p.hidden, p.rank};
      ResidentBank<T> up_bank{p.up_weight + up * bank_size, p.hidden, p.rank};
      if (down != down_now) {
        flush_down();
        down_weights.keep(down_bank, col0);
      }
      if (up != up_now) {
        flush_up();
        up_weights.keep(up_bank, col0);
      }
      down_now = down, up_now = up;

      // Two ranks of a row for each of the first 128 threads.
      int own_row = threadIdx.x / 8, own_rank = static_cast<int>(threadIdx.x) % 8 * 2;
      bool own = threadIdx.x < 128 && own_row < count && own_rank < p.rank;
      uint32_t pre = 0;
      if (own) {
        pre = *reinterpret_cast<const uint32_t*>(p.pre + static_cast<int64_t>(first + own_row) * p.rank + own_rank);
      }
      const T* dy = stages + tile % 2 * 2 * kTile;
      auto words_of = [&](int row, int c) {
        return *reinterpret_cast<const Words*>(dy + pass_place(row, c * 4 + fragment_part()));
      };
      float sums[2][4] = {};
      uint32_t w[4][2];
      copy_wait<1>();
      __syncwarp();
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        up_weights.get(w, up_bank, c, col0);
        Words top = words_of(fragment_row(), c), bottom = words_of(fragment_row() + 8, c);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          multiply_rows<T>(sums[u], top, bottom, w[0][u], w[1][u], w[2][u], w[3][u]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Piece<float> piece{{sums[0][2 * half], sums[0][2 * half + 1], sums[1][2 * half], sums[1][2 * half + 1]}};
        *reinterpret_cast<Piece<float>*>(memory.sums + (warp * kFragmentRows + half * 8 + fragment_row()) *
                                                           kFragmentRanks + fragment_part() * 4) = piece;
      }
      __syncthreads();
      if (threadIdx.x < 128) {
        const float* from = memory.sums + threadIdx.x * 2;
        float low = from[0], high = from[1];
#pragma unroll 4
        for (int other = 1; other < warps; ++other) {
          from += kFragmentRows * kFragmentRanks;
          low += from[0], high += from[1];
        }
        uint32_t dpre = 0, h = 0;
        if (own) {
          float pre_low = low_of<T>(pre), pre_high = high_of<T>(pre);
          dpre = word_of<T>(low * activation_slope(p.activation, pre_low),
                            high * activation_slope(p.activation, pre_high));
          h = word_of<T>(activate(p.activation, pre_low), activate(p.activation, pre_high));
          down_bias[0] += low_of<T>(dpre), down_bias[1] += high_of<T>(dpre);
        }
        memory.dpre[threadIdx.x] = dpre;
        memory.h[threadIdx.x] = h;
      }
      __syncthreads();

      auto narrow_place = [](int row, int piece) { return row * kFragmentRanks + piece * 8; };
      if (p.dx != nullptr) {
        const uint32_t* from = memory.dpre + fragment_row() * 8 + fragment_part() * 2;
        TwoWords a = *reinterpret_cast<const TwoWords*>(from), b = *reinterpret_cast<const TwoWords*>(from + 64);
        T* to = p.dx + static_cast<int64_t>(first + fragment_row()) * p.hidden + col0;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          down_weights.get(w, down_bank, c, col0);
          Words top = words_of(fragment_row(), c), bottom = words_of(fragment_row() + 8, c);
          Words low, high;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            float parts[4] = {low_of<T>(top.at[k]), high_of<T>(top.at[k]), low_of<T>(bottom.at[k]),
                              high_of<T>(bottom.at[k])};
            up_bias[c][2 * k] += parts[0] + parts[2], up_bias[c][2 * k + 1] += parts[1] + parts[3];
            if (!p.add_input) parts[0] = parts[1] = parts[2] = parts[3] = 0.f;
            multiply<T>(parts, a.at[0], b.at[0], a.at[1], b.at[1], w[k][0], w[k][1]);
            low.at[k] = word_of<T>(parts[0], parts[1]);
            high.at[k] = word_of<T>(parts[2], parts[3]);
          }
          T* row = to + c * kFragmentCols;
          if (fragment_row() < count) *reinterpret_cast<Words*>(row) = low;
          if (fragment_row() + 8 < count) *reinterpret_cast<Words*>(row + static_cast<int64_t>(8) * p.hidden) = high;
        }
      } else if (p.need_up) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          Words top = words_of(fragment_row(), c), bottom = words_of(fragment_row() + 8, c);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            up_bias[c][2 * k] += low_of<T>(top.at[k]) + low_of<T>(bottom.at[k]);
            up_bias[c][2 * k + 1] += high_of<T>(top.at[k]) + high_of<T>(bottom.at[k]);
          }
        }
      }
      uint32_t turned[4];
      if (p.need_up) {
        load_turned<1>(turned, reinterpret_cast<const T*>(memory.h), 0, 0, narrow_place);
        of_up.add(turned, dy);
      }
      if (p.need_down) {
        load_turned<1>(turned, reinterpret_cast<const T*>(memory.dpre), 0, 0, narrow_place);
        of_down.add(turned, dy + kTile);
      }
    }

    int blocks = cluster_size(), number = cluster_rank();
    if (blocks == 1) {
      flush_down();
      flush_up();
    } else {
      // What the cluster's blocks hold of one expert goes into one plane, that of its first block.
      __syncthreads();
      if (threadIdx.x == 0) {
        memory.held[0] = p.need_down ? down_now : kNoExpert;
        memory.held[1] = memory.held[0] == kNoExpert ? 0 : down_slots.find(down_now);
        memory.held[2] = p.need_up ? up_now : kNoExpert;
        memory.held[3] = memory.held[2] == kNoExpert ? 0 : up_slots.find(up_now);
      }
      cluster_arrive(), cluster_wait();
      float* all = reinterpret_cast<float*>(memory.stages);
      auto join = [&](int side, const PassSums& sums, auto join_bias, int biases, auto flush) {
        int expert = *cluster_at(memory.held + 2 * side, 0), slot = *cluster_at(memory.held + 2 * side + 1, 0);
        bool alike = expert != kNoExpert;
        for (int other = 1; other < blocks; ++other) {
          int theirs = *cluster_at(memory.held + 2 * side, other);
          alike = alike && (theirs == expert || theirs == kNoExpert);
        }
        if (!alike) {
          flush();
          return;
        }
        join_bias();
        auto place_of = [&](int n) { return all + (n * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 4; };
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          *reinterpret_cast<Piece<float>*>(place_of(n)) =
              Piece<float>{{sums.at[n][0], sums.at[n][1], sums.at[n][2], sums.at[n][3]}};
        }
        cluster_arrive(), cluster_wait();
        int* slots = memory.slots + side * p.slots;
        bool fresh = *cluster_at(slots + slot, 0) == kNoExpert;
        float* plane = p.planes + (plane0 - static_cast<int64_t>(number) * 2 * p.slots + side * p.slots + slot) * p.planes_size;
        for (int n = number; n < 8; n += blocks) {
          Piece<float> sum{{0.f, 0.f, 0.f, 0.f}};
          for (int other = 0; other < blocks; ++other) {
            Piece<float> one = *reinterpret_cast<const Piece<float>*>(cluster_at(place_of(n), other));
#pragma unroll
            for (int e = 0; e < 4; ++e) sum.values[e] += one.values[e];
          }
          PassSums::leave_tile(plane, p.rank, p.hidden, fresh, n, sum);
        }
        if (number == 0) leave_bias(plane, fresh, biases, blocks);
        cluster_arrive(), cluster_wait();
        if (number == 0 && threadIdx.x == 0) slots[slot] = expert;
      };
      join(0, of_down, join_down_bias, p.rank, flush_down);
      join(1, of_up, join_up_bias, p.hidden, flush_up);
      cluster_arrive(), cluster_wait();  // others may still read what this block holds
    }
    for (int i = threadIdx.x; i < 2 * p.slots; i += blockDim.x) p.experts[plane0 + i] = memory.slots[i];
  }
}

// Every gradient = the sum of its planes, in the order of the blocks that left them; zero where none did.
template <typename T>
__global__ void __launch_bounds__(kPassSumThreads) routed_adapter_pass_sum_kernel(RoutedAdapterPassSum<T> p) {
  SharedMemory memory;
  int planes = p.blocks * p.slots;
  int* found = memory.take<int>(planes + 1);
  bool up = static_cast<int>(blockIdx.x) >= p.down_jobs;
  int job = static_cast<int>(blockIdx.x) - (up ? p.down_jobs : 0);
  int expert = job / p.chunks, side = up ? p.slots : 0;
  if (threadIdx.x < 32) {
    int count = 0;
    for (int from = 0; from < planes; from += 32) {
      int at = from + static_cast<int>(threadIdx.x), plane = at / p.slots * 2 * p.slots + side + at % p.slots;
      bool mine = at < planes && p.experts[plane] == expert;
      uint32_t all = __ballot_sync(0xffffffffu, mine);
      if (mine) found[1 + count + __popc(all & ((1u << threadIdx.x) - 1))] = plane;
      count += __popc(all);
    }
    if (threadIdx.x == 0) found[0] = count;
  }
  __syncthreads();
  // Each quarter of the threads adds up a quarter of the planes.
  constexpr int kSize = Piece<float>::kSize, kPieces = kPassSumThreads / kPassSumParts;
  int piece = threadIdx.x % kPieces, part = threadIdx.x / kPieces;
  int at = (job % p.chunks * kPieces + piece) * kSize;
  int weights = p.rank * p.hidden, biases = up ? p.hidden : p.rank, count = found[0];
  int a_part = ceil_div(count, kPassSumParts), last = count < (part + 1) * a_part ? count : (part + 1) * a_part;
  float sums[kSize] = {};
  if (at < weights + biases) {
#pragma unroll 8
    for (int i = part * a_part; i < last; ++i) {
      Piece<float> one = *reinterpret_cast<const Piece<float>*>(p.planes + found[1 + i] * p.planes_size + at);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums[e] += one.values[e];
    }
  }
  float* all = memory.take<float>(kPassSumThreads * kSize);
#pragma unroll
  for (int e = 0; e < kSize; ++e) all[threadIdx.x * kSize + e] = sums[e];
  __syncthreads();
  if (part > 0 || at >= weights + biases) return;
#pragma unroll
  for (int other = 1; other < kPassSumParts; ++other) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) sums[e] += all[(other * kPieces + piece) * kSize + e];
  }
  T* weight = up ? p.up_weight : p.down_weight;
  T* bias = up ? p.up_bias : p.down_bias;
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    int element = at + e;
    if (element >= weights + biases) return;
    T value = from_float<T>(sums[e]);
    if (element >= weights) {
      bias[static_cast<int64_t>(expert) * biases + element - weights] = value;
    } else if (up) {
      weight[static_cast<int64_t>(expert) * weights + element % p.hidden * p.rank + element / p.hidden] = value;
    } else {
      weight[static_cast<int64_t>(expert) * weights + element] = value;
    }
  }
}

}  // namespace adamix
