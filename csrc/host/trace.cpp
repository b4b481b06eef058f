// Which kernels were launched, and what was asked of the CUDA runtime: for tests.
#include <cstddef>
#include <string>

#include "host/fibers.h"
#include "host/runtime.h"

namespace adamix::host {
namespace {

// Nobody may ever ask.
constexpr size_t kMostBytes = 1 << 20;

struct Lines {
  std::string noted, taken;

  void note(const std::string& line) {
    if (noted.size() < kMostBytes) noted.append(line).push_back('\n');
  }
  const char* take() {
    taken.swap(noted);
    noted.clear();
    return taken.c_str();
  }
};

thread_local Lines launches, calls;

}  // namespace

void note_launch(const char* name) { launches.note(name); }

void note_call(const char* name) {
  if (!idle()) calls.note(name);
}

void note_call(const char* name, int first, int second) {
  if (!idle()) calls.note(std::string(name) + " " + std::to_string(first) + " " + std::to_string(second));
}

}  // namespace adamix::host

#define ADAMIX_SHOWN extern "C" __attribute__((visibility("default")))

// The names of this thread's launches since the last call, a line each; valid until the next call.
ADAMIX_SHOWN const char* adamix_host_launches() { return adamix::host::launches.take(); }

// This thread's calls of the CUDA runtime since the last call, a line each; the same.
ADAMIX_SHOWN const char* adamix_host_calls() { return adamix::host::calls.take(); }
