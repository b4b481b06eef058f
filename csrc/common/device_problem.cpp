// Why this library cannot run here, or not so large a call, asked of the driver before anything is launched.
#include "common/checks.h"
#include "common/planes.h"
#include "common/tile_columns.h"
#include "merge/most_merged.h"
#include "registration.h"

namespace adamix {
namespace {

// On the CPU the environment says what device it stands for.
int index_of([[maybe_unused]] int64_t device) {
#if defined(ADAMIX_HOST)
  return host::device_of_environment();
#else
  return check_int("device", device);
#endif
}

// That a block may ask for.
size_t shared_bytes_of(int64_t device) {
  int shared = 0;
  check_cuda("cudaDeviceGetAttribute",
             cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_of(device)));
  return static_cast<size_t>(shared);
}

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

}  // namespace

// Empty where the driver is new enough for the CUDA runtime inside this library; no device is touched.
std::string driver_problem() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess) {
    cudaGetLastError();
    return "the driver does not tell its version";
  }
  if (driver == 0) return "there is no NVIDIA driver";
  if (driver / 1000 >= runtime / 1000) return "";
  return "the driver is of CUDA " + dotted(driver) + ", the library was compiled with CUDA " + dotted(runtime) +
         ": a newer driver is needed, or a library built with nvcc " + std::to_string(driver / 1000);
}

// Empty where a kernel of this library loads on the device; that makes the device's context.
std::string device_problem(int64_t device) {
  try {
    DeviceScope scope(index_of(device));
    cudaFuncAttributes attributes{};
    check_cuda("its kernels do not load", cudaFuncGetAttributes(&attributes, any_kernel()));
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

int64_t tile_columns(int64_t device, int64_t element_bytes) {
  if (element_bytes != 2 && element_bytes != 4) fail("element_bytes", std::to_string(element_bytes), "2 or 4");
  return most_tile_columns(static_cast<int>(element_bytes), shared_bytes_of(device));
}

int64_t most_merged(int64_t device) { return most_merged_experts(shared_bytes_of(device)); }

}  // namespace adamix
