// Asynchronous copies: done at the wait, not before, so that a kernel that does not wait reads what was there.
// Compiled with the sanitisers of the kernels, which see the accesses as the thread's own.
#include "host/cuda.h"
#include "host/fibers.h"

namespace adamix::host {

void copy_async(void* shared, const void* global) { copies_of_this_thread().open.push_back({shared, global}); }

void copy_commit() {
  Copies& copies = copies_of_this_thread();
  copies.committed.push_back(std::move(copies.open));
  copies.open.clear();
}

void copy_wait(int pending) {
  Copies& copies = copies_of_this_thread();
  while (static_cast<int>(copies.committed.size()) > pending) {
    for (const Copy& copy : copies.committed.front()) {
      *static_cast<uint4*>(copy.target) = *static_cast<const uint4*>(copy.source);
    }
    copies.committed.pop_front();
  }
}

}  // namespace adamix::host
