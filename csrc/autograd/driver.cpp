#include "autograd/driver.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

namespace adamix::driver {
namespace {

// As cuda.h has them; a launch has no attributes here.
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

struct Driver {
  int (*launch)(const LaunchConfig*, void* function, void** parameters, void** extra);
  int (*current_context)(void**);
  int (*set_context)(void*);
  int (*retain_context)(void**, int device);
  int (*device)(int*, int ordinal);
  int (*error_text)(int, const char**);
};

template <typename F>
F symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  TORCH_CHECK(found != nullptr, "libcuda.so.1 has no ", name);
  return reinterpret_cast<F>(found);
}

const Driver& loaded() {
  static const Driver made = [] {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    TORCH_CHECK(library != nullptr, "libcuda.so.1 did not load");
    return Driver{symbol<decltype(Driver::launch)>(library, "cuLaunchKernelEx"),
                  symbol<decltype(Driver::current_context)>(library, "cuCtxGetCurrent"),
                  symbol<decltype(Driver::set_context)>(library, "cuCtxSetCurrent"),
                  symbol<decltype(Driver::retain_context)>(library, "cuDevicePrimaryCtxRetain"),
                  symbol<decltype(Driver::device)>(library, "cuDeviceGet"),
                  symbol<decltype(Driver::error_text)>(library, "cuGetErrorString")};
  }();
  return made;
}

}  // namespace

int launch(const Launch& launch, uint64_t stream, void** parameters) {
  LaunchConfig config{{launch.grid[0], launch.grid[1], launch.grid[2]},
                      {launch.threads, 1, 1},
                      launch.shared,
                      reinterpret_cast<void*>(stream),
                      nullptr,
                      0};
  return loaded().launch(&config, launch.function, parameters, nullptr);
}

void check(int code) {
  if (code == 0) return;
  const char* text = "unknown error";
  loaded().error_text(code, &text);
  TORCH_CHECK(false, "Triton Error [CUDA]: ", text);
}

void ensure_context(int ordinal) {
  void* context = nullptr;
  check(loaded().current_context(&context));
  if (context != nullptr) return;
  int device = 0;
  check(loaded().device(&device, ordinal));
  check(loaded().retain_context(&context, device));
  check(loaded().set_context(context));
}

}  // namespace adamix::driver
