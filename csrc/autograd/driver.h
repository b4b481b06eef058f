// The CUDA driver, found when it is first needed: this module is built and loaded where none is.
#pragma once

#include <cstdint>

namespace adamix::driver {

struct Launch {
  void* function;
  unsigned grid[3], threads, shared;
};

// The driver's code: 0, or what `check` throws. parameters: addresses of the kernel's arguments.
int launch(const Launch& launch, uint64_t stream, void** parameters);
void check(int code);

// A thread that has not used the GPU yet has no context, and memory from a cache does not give it one.
void ensure_context(int ordinal);

}  // namespace adamix::driver
