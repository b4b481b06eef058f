// Which kernels were launched: tests count the cases that each of them ran in.
#include <cstddef>
#include <string>

#include "host/fibers.h"

namespace adamix::host {
namespace {

// Nobody may ever ask.
constexpr size_t kMostBytes = 1 << 20;
thread_local std::string names, taken;

}  // namespace

void note_launch(const char* name) {
  if (names.size() < kMostBytes) names.append(name).push_back('\n');
}

}  // namespace adamix::host

// The names of this thread's launches since the last call, a line each; valid until the next call.
extern "C" __attribute__((visibility("default"))) const char* adamix_host_launches() {
  adamix::host::taken.swap(adamix::host::names);
  adamix::host::names.clear();
  return adamix::host::taken.c_str();
}
