// One set of kernel sources, three compilers: nvcc, NVRTC (sm_70), and g++ for the CPU (ADAMIX_HOST).
#pragma once

#if defined(ADAMIX_HOST)
#include "host/cuda.h"
#include "host/runtime.h"
#elif defined(__CUDACC_RTC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/std/cstdint>
using cuda::std::int32_t;
using cuda::std::int64_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;
using cuda::std::uintptr_t;
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint32_t;
using std::uint64_t;
using std::uintptr_t;
#endif

// Launchers and everything that only the host calls; NVRTC compiles device code alone.
#if !defined(__CUDACC_RTC__)
#define ADAMIX_LAUNCHERS 1
#endif

// The architecture the device code is compiled for: 0 on the CPU, where every path is the portable one.
#if defined(__CUDA_ARCH__)
#define ADAMIX_ARCH __CUDA_ARCH__
#else
#define ADAMIX_ARCH 0
#endif

#define ADAMIX_DEVICE __device__ __forceinline__
#define ADAMIX_BOTH __host__ __device__ __forceinline__
