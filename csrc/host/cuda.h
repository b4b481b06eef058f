// CUDA on the CPU, for tests: what the kernels of csrc/ need to compile with g++ and run block by block.
//
// Each CUDA thread is a fiber; __syncthreads and __syncwarp are barriers between fibers, and the only things that
// order memory: a sanitiser that knows fibers (ThreadSanitizer) then sees a missing barrier as a data race.
// Blocks run one after another; shared memory and asynchronous copies hold NaN patterns until they are written.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint32_t;
using std::uint64_t;
using std::uintptr_t;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace adamix {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

namespace host {

struct Coordinates {
  dim3 thread, block, block_size, grid;
};

// Where the calling fiber is.
const Coordinates& here();

// Runs body once for each thread of the grid, in the order that fibers.cpp tells. Throws std::runtime_error when
// threads wait for each other for ever, or when arrays of shared memory exceed shared_bytes.
void run(dim3 grid, int threads, size_t shared_bytes, int cluster, const std::function<void()>& body);

void* shared_array(int number, size_t bytes, size_t alignment);

void block_barrier();
void warp_barrier();
// All lanes of the warp meet here, without any ordering of memory, as the matrix instructions demand.
void converge_warp();
// An operand of a matrix instruction, and its pitch, as the device wants them aligned.
void check_operand(const void* operand, size_t pitch_bytes);
// The value that `lane` of this warp passed to the same call.
uint32_t exchange(uint32_t value, int lane);
uint32_t ballot(bool vote);
// The words of a matrix instruction that decide this lane's sums: four of each lane of its row, two of each lane of its
// two columns.
struct Operands {
  uint32_t left[4][4], right[2][4][2];
};
struct Words6 {
  uint32_t at[6];
};
// Of what the lanes of the warp passed to the same call: a lane's four words of the left operand, two of the right one.
void exchange_operands(const Words6& mine, Operands& all);
bool block_any(bool vote);

void copy_async(void* shared, const void* global);
void copy_commit();
void copy_wait(int pending);

int cluster_rank();
int cluster_size();
void cluster_barrier();
// The same array of shared memory in the cluster's block `rank`.
void* cluster_peer(void* shared, int rank);

float widen(half v);
float widen(bfloat16 v);
template <typename T>
T narrow(float v);
template <>
half narrow<half>(float v);
template <>
bfloat16 narrow<bfloat16>(float v);
template <>
inline float narrow<float>(float v) {
  return v;
}

}  // namespace host
}  // namespace adamix

#define threadIdx (adamix::host::here().thread)
#define blockIdx (adamix::host::here().block)
#define blockDim (adamix::host::here().block_size)
#define gridDim (adamix::host::here().grid)

inline void __syncthreads() { adamix::host::block_barrier(); }
inline void __syncwarp() { adamix::host::warp_barrier(); }
inline int __syncthreads_or(int vote) { return adamix::host::block_any(vote != 0); }
inline unsigned __ballot_sync(unsigned, int vote) { return adamix::host::ballot(vote != 0); }
inline int __any_sync(unsigned, int vote) { return adamix::host::ballot(vote != 0) != 0; }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) == 4, "32-bit values");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = adamix::host::exchange(bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
