// What the parts of the emulation share.
#pragma once

#include <deque>
#include <vector>

namespace adamix::host {

struct Copy {
  void* target;
  const void* source;
};

// A thread's asynchronous copies: the group that is open, and those that were committed and not waited for.
struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;

  void clear() {
    open.clear();
    committed.clear();
  }
};

Copies& copies_of_this_thread();

// For `adamix_host_calls`: a call of the CUDA runtime, and what it asked for.
void note_call(const char* name);
void note_call(const char* name, int first, int second);

}  // namespace adamix::host
