#include "common/planes.h"

namespace adamix {

constexpr int kSumThreads = 256;
constexpr int kSize = Piece<float>::kSize;

template <typename T>
__global__ void __launch_bounds__(kSumThreads) plane_sum_kernel(PlaneSum<T> p) {
  int64_t at = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * kSize;
#pragma unroll
  for (int g = 0; g < kMaxGrads; ++g) {
    const Grad<T>& grad = p.grad[g];
    int64_t left = grad.size - (at - grad.begin);
    if (g >= p.grads || at < grad.begin || left <= 0) continue;
    float sums[kSize] = {};
    const float* from = p.planes + at;
    if (left >= kSize) {
#pragma unroll 8
      for (int share = 0; share < p.shares; ++share) {
        Piece<float> piece = *reinterpret_cast<const Piece<float>*>(from + share * p.plane_size);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[e] += piece.values[e];
      }
    } else {
      for (int share = 0; share < p.shares; ++share) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[e] += e < left ? from[share * p.plane_size + e] : 0.f;
      }
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      if (e < left) grad.out[at - grad.begin + e] = from_float<T>(sums[e]);
    }
  }
}

#define ADAMIX_INSTANTIATE(T) template __global__ void plane_sum_kernel<T>(PlaneSum<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_plane_sum(const char* name, const PlaneSum<T>& params, const Device& device) {
  int64_t blocks = (params.plane_size + kSumThreads * kSize - 1) / (kSumThreads * kSize);
  launch(name, plane_sum_kernel<T>, {dim3(static_cast<unsigned>(blocks)), kSumThreads, 0}, device, params);
}

template void launch_plane_sum(const char*, const PlaneSum<float>&, const Device&);
template void launch_plane_sum(const char*, const PlaneSum<half>&, const Device&);
template void launch_plane_sum(const char*, const PlaneSum<bfloat16>&, const Device&);

const void* any_kernel() { return reinterpret_cast<const void*>(plane_sum_kernel<float>); }
#endif

}  // namespace adamix
