// Why this library cannot run here, asked of the driver before anything is launched.
#include "common/checks.h"
#include "common/planes.h"
#include "registration.h"

namespace adamix {
namespace {

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
#if defined(ADAMIX_HOST)
    DeviceScope scope(host::device_of_environment());
    (void)device;
#else
    DeviceScope scope(check_int("device", device));
#endif
    cudaFuncAttributes attributes{};
    check_cuda("its kernels do not load", cudaFuncGetAttributes(&attributes, any_kernel()));
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace adamix
