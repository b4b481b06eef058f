// A kernel with faults to order: proof that the emulation and the sanitisers see them. Host builds only.
#include "common/copy.h"
#include "common/launch.h"
#include "common/shared_memory.h"
#include "host/selftest.h"

namespace adamix {
namespace {

constexpr int kThreads = 64;
constexpr int kSize = Piece<float>::kSize;

struct Reverse {
  const float* in;
  float* out;
  int count;  // kThreads * kSize
  Fault fault;
};

struct Tile {
  float* values;
  float* behind;

  template <typename Memory>
  ADAMIX_BOTH explicit Tile(Memory& memory, int count) {
    values = memory.template take<float>(count);
    behind = memory.template take<float>(1);
  }
};

// out[i] = in[count - 1 - i], through shared memory.
__global__ void reverse_kernel(Reverse p) {
  SharedMemory memory;
  Tile tile(memory, p.count);
  int first = threadIdx.x * kSize;
  if (p.fault != Fault::kUninitialised || threadIdx.x != 0) copy_async(tile.values + first, p.in + first);
  copy_commit();
  if (p.fault != Fault::kNoWait) copy_wait<0>();
  if (p.fault == Fault::kDivergentBarrier && threadIdx.x == 0) return __syncwarp();
  if (p.fault != Fault::kNoBarrier) __syncthreads();
  if (p.fault == Fault::kSharedBounds) tile.values[p.count + static_cast<int>(threadIdx.x)] = 0.f;
  for (int i = first; i < first + kSize; ++i) {
    p.out[i + (p.fault == Fault::kGlobalBounds ? 1 : 0)] = tile.values[p.count - 1 - i];
  }
}

}  // namespace

void launch_reverse(const float* in, float* out, Fault fault, size_t more_shared, const Device& device) {
  constexpr int kCount = kThreads * kSize;
  size_t bytes = shared_bytes<Tile>(fault == Fault::kSharedLimit ? kCount / 2 : kCount) + more_shared;
  Reverse params{in, out, kCount, fault};
  if (fault != Fault::kOwnLimit) return launch("selftest", reverse_kernel, {dim3(1), kThreads, bytes}, device, params);
  // As if the limit were the launch's own.
  cudaFuncSetAttribute(reinterpret_cast<const void*>(reverse_kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  cudaLaunchConfig_t config{dim3(1), dim3(kThreads), bytes, nullptr, nullptr, 0};
  cudaError_t error = cudaLaunchKernelEx(&config, reverse_kernel, params);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace adamix
