// The scheduler behind host/cuda.h. Compiled without sanitisers, whatever the rest is compiled with: it tells them
// about the fibers instead.
//
// ADAMIX_HOST_ORDER: "forward" (default), "reverse" or a number that seeds a shuffle; the order in which blocks,
// and threads between two barriers, run. A kernel's result may not depend on it.
#include "host/fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/cuda.h"

extern "C" {
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* address) __attribute__((weak));
void __tsan_release(void* address) __attribute__((weak));
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size) __attribute__((weak));
}

namespace adamix::host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kNoSynchronisation = 1;
constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xff;  // NaN in every element type

void acquire(char* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

void release(char* address) {
  if (__tsan_release) __tsan_release(address);
}

enum class Wait { kNone, kBlock, kWarp, kConverge, kExchange, kCluster };

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::kBlock:
      return "__syncthreads";
    case Wait::kWarp:
      return "__syncwarp";
    case Wait::kConverge:
      return "a matrix instruction";
    case Wait::kExchange:
      return "a shuffle or a vote";
    case Wait::kCluster:
      return "a cluster barrier";
    case Wait::kNone:
      break;
  }
  return "nothing";
}

// Threads that meet: released when all that still run have arrived.
struct Meeting {
  Wait wait = Wait::kNone;
  int running = 0;
  int arrived = 0;
  unsigned generation = 0;
  char order[2];  // what a sanitiser hangs the ordering of memory on; two, as a thread may be one meeting ahead
  uint32_t values[2][kWarp];
  Words6 operands[2][kWarp];
};

struct Array {
  unsigned char* data;
  size_t bytes;
  char order;  // allocated before anybody uses it
};

struct Block {
  Meeting barrier;
  std::vector<Meeting> warps;
  std::deque<Array> arrays;
  size_t used = 0;
  bool votes[2];
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  Coordinates at;
  Block* block = nullptr;
  int rank = 0;
  Meeting* waiting_at = nullptr;
  unsigned waiting_for = 0;
  bool done = true;
  Copies copies;
};

struct Scheduler {
  ucontext_t context;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  Fiber* current = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks;
  Meeting cluster;
  char begin, end;
  size_t shared_limit = 0;
  std::string error;
  const std::function<void()>* body = nullptr;
};

thread_local Scheduler scheduler;

void to_scheduler() {
  Fiber* self = scheduler.current;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&self->fake_stack, scheduler.stack_bottom, scheduler.stack_bytes);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler.tsan, kNoSynchronisation);
  swapcontext(&self->context, &scheduler.context);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler.stack_bottom, &scheduler.stack_bytes);
  }
}

void to_fiber(Fiber* fiber) {
  scheduler.current = fiber;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&scheduler.fake_stack, fiber->stack, kStackBytes);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber->tsan, kNoSynchronisation);
  swapcontext(&scheduler.context, &fiber->context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
}

void open_if_complete(Meeting* meeting) {
  if (meeting->arrived == 0 || meeting->arrived < meeting->running) return;
  meeting->arrived = 0;
  meeting->wait = Wait::kNone;
  ++meeting->generation;
}

Meeting* warp_of(Fiber* fiber) { return &fiber->block->warps[fiber->at.thread.x / kWarp]; }

// Waits for the others; returns which of the two generations it was.
unsigned meet(Meeting* meeting, Wait wait, bool orders_memory) {
  Fiber* self = scheduler.current;
  if (meeting->wait != Wait::kNone && meeting->wait != wait) {
    scheduler.error = "thread " + std::to_string(self->at.thread.x) + " waits for " + name_of(wait) +
                      ", others of its group for " + name_of(meeting->wait);
    to_scheduler();
  }
  meeting->wait = wait;
  unsigned generation = meeting->generation;
  if (orders_memory) release(&meeting->order[generation % 2]);
  ++meeting->arrived;
  open_if_complete(meeting);
  if (meeting->generation == generation) {
    self->waiting_at = meeting;
    self->waiting_for = generation;
    to_scheduler();
    self->waiting_at = nullptr;
  }
  if (orders_memory) acquire(&meeting->order[generation % 2]);
  return generation % 2;
}

void fiber_main() {
  Fiber* self = scheduler.current;
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_bytes);
  }
  for (;;) {
    acquire(&scheduler.begin);
    (*scheduler.body)();
    self->copies.clear();
    release(&scheduler.end);
    self->done = true;
    for (Meeting* meeting : {&self->block->barrier, warp_of(self), &scheduler.cluster}) {
      --meeting->running;
      open_if_complete(meeting);
    }
    to_scheduler();
  }
}

Fiber* new_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fiber->stack == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
  if (__tsan_create_fiber) fiber->tsan = __tsan_create_fiber(0);
  scheduler.fibers.push_back(std::move(fiber));
  return scheduler.fibers.back().get();
}

std::vector<int> order_of(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  const char* wanted = std::getenv("ADAMIX_HOST_ORDER");
  if (wanted == nullptr || std::string(wanted) == "forward") return order;
  if (std::string(wanted) == "reverse") {
    std::reverse(order.begin(), order.end());
  } else {
    std::shuffle(order.begin(), order.end(), std::mt19937(std::atoi(wanted)));
  }
  return order;
}

void prepare(int first_block, dim3 grid, int threads, int cluster) {
  for (Block& block : scheduler.blocks) {
    for (Array& array : block.arrays) std::free(array.data);
  }
  scheduler.blocks.assign(cluster, Block());
  scheduler.cluster = Meeting();
  scheduler.cluster.running = threads * cluster;
  for (int rank = 0; rank < cluster; ++rank) {
    Block& block = scheduler.blocks[rank];
    block.barrier.running = threads;
    block.warps.resize(threads / kWarp);
    for (Meeting& warp : block.warps) warp.running = kWarp;
    unsigned number = first_block + rank;
    for (int thread = 0; thread < threads; ++thread) {
      Fiber* fiber = scheduler.fibers[rank * threads + thread].get();
      fiber->at.thread = dim3(thread, 0, 0);
      fiber->at.block = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
      fiber->at.block_size = dim3(threads);
      fiber->at.grid = grid;
      fiber->block = &block;
      fiber->rank = rank;
      fiber->done = false;
    }
  }
}

// Runs the prepared fibers until all are done.
void finish(const std::vector<int>& order) {
  release(&scheduler.begin);
  for (bool progress = true; progress;) {
    progress = false;
    for (int index : order) {
      Fiber* fiber = scheduler.fibers[index].get();
      if (fiber->done) continue;
      if (fiber->waiting_at != nullptr && fiber->waiting_at->generation == fiber->waiting_for) continue;
      to_fiber(fiber);
      progress = true;
      if (!scheduler.error.empty()) return;
    }
  }
  for (int index : order) {
    Fiber* fiber = scheduler.fibers[index].get();
    if (fiber->done) continue;
    scheduler.error =
        "thread " + std::to_string(fiber->at.thread.x) + " waits for " + name_of(fiber->waiting_at->wait) + " for ever";
    return;
  }
  acquire(&scheduler.end);
}

}  // namespace

const Coordinates& here() { return scheduler.current->at; }

Copies& copies_of_this_thread() { return scheduler.current->copies; }

void run(dim3 grid, int threads, size_t shared_bytes, int cluster, const std::function<void()>& body) {
  if (threads % kWarp != 0 || grid.x % cluster != 0) {
    throw std::runtime_error("a block is whole warps, and a grid whole clusters");
  }
  if (__tsan_get_current_fiber) scheduler.tsan = __tsan_get_current_fiber();
  while (scheduler.fibers.size() < static_cast<size_t>(threads * cluster)) new_fiber();
  scheduler.body = &body;
  scheduler.shared_limit = shared_bytes;
  std::vector<int> order = order_of(threads * cluster);
  for (int group : order_of(grid.x * grid.y * grid.z / cluster)) {
    prepare(group * cluster, grid, threads, cluster);
    finish(order);
    if (!scheduler.error.empty()) {
      // Their stacks cannot be unwound from here: they are left, and later launches get new ones.
      for (auto& fiber : scheduler.fibers) fiber.release();
      scheduler.fibers.clear();
      std::string error;
      error.swap(scheduler.error);
      throw std::runtime_error(error);
    }
  }
}

void* shared_array(int number, size_t bytes, size_t alignment) {
  Block* block = scheduler.current->block;
  if (number == static_cast<int>(block->arrays.size())) {
    Array array{nullptr, bytes, 0};
    block->used += (bytes + alignment - 1) / alignment * alignment;
    if (block->used > scheduler.shared_limit) {
      scheduler.error = "the kernel takes more shared memory than its launch gives";
      to_scheduler();
    }
    if (posix_memalign(reinterpret_cast<void**>(&array.data), alignment, std::max<size_t>(bytes, 1)) != 0) std::abort();
    std::memset(array.data, kPoison, bytes);
    block->arrays.push_back(array);
    release(&block->arrays.back().order);
  }
  acquire(&block->arrays[number].order);
  if (block->arrays[number].bytes != bytes) {
    scheduler.error = "threads of a block disagree on the size of an array of shared memory";
    to_scheduler();
  }
  return block->arrays[number].data;
}

void block_barrier() { meet(&scheduler.current->block->barrier, Wait::kBlock, true); }

void warp_barrier() { meet(warp_of(scheduler.current), Wait::kWarp, true); }

void converge_warp() { meet(warp_of(scheduler.current), Wait::kConverge, false); }

void check_operand(const void* operand, size_t pitch_bytes) {
  if (reinterpret_cast<uintptr_t>(operand) % 32 == 0 && pitch_bytes % 16 == 0) return;
  scheduler.error = "a matrix operand that is not aligned to 32 bytes, or its pitch to 16";
  to_scheduler();
}

uint32_t exchange(uint32_t value, int lane) {
  Meeting* warp = warp_of(scheduler.current);
  warp->values[warp->generation % 2][scheduler.current->at.thread.x % kWarp] = value;
  unsigned generation = meet(warp, Wait::kExchange, false);
  return warp->values[generation][lane % kWarp];
}

uint32_t ballot(bool vote) {
  Meeting* warp = warp_of(scheduler.current);
  warp->values[warp->generation % 2][scheduler.current->at.thread.x % kWarp] = vote;
  unsigned generation = meet(warp, Wait::kExchange, false);
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) votes |= (warp->values[generation][lane] & 1u) << lane;
  return votes;
}

void exchange_operands(const Words6& mine, Operands& all) {
  Meeting* warp = warp_of(scheduler.current);
  int self = scheduler.current->at.thread.x % kWarp, row = self / 4, column = self % 4 * 2;
  warp->operands[warp->generation % 2][self] = mine;
  const Words6* lanes = warp->operands[meet(warp, Wait::kExchange, false)];
  for (int part = 0; part < 4; ++part) {
    for (int word = 0; word < 4; ++word) all.left[part][word] = lanes[4 * row + part].at[word];
    for (int word = 0; word < 2; ++word) {
      all.right[0][part][word] = lanes[4 * column + part].at[4 + word];
      all.right[1][part][word] = lanes[4 * column + 4 + part].at[4 + word];
    }
  }
}

bool block_any(bool vote) {
  Block* block = scheduler.current->block;
  unsigned generation = block->barrier.generation % 2;
  if (block->barrier.arrived == 0) block->votes[generation] = false;
  block->votes[generation] |= vote;
  meet(&block->barrier, Wait::kBlock, true);
  return block->votes[generation];
}

int cluster_rank() { return scheduler.current->rank; }

int cluster_size() { return static_cast<int>(scheduler.blocks.size()); }

void cluster_barrier() { meet(&scheduler.cluster, Wait::kCluster, true); }

void* cluster_peer(void* shared, int rank) {
  auto* address = static_cast<unsigned char*>(shared);
  const std::deque<Array>& own = scheduler.current->block->arrays;
  for (size_t number = 0; number < own.size(); ++number) {
    if (address < own[number].data || address >= own[number].data + own[number].bytes) continue;
    const std::deque<Array>& peer = scheduler.blocks[rank].arrays;
    if (number < peer.size()) return peer[number].data + (address - own[number].data);
  }
  scheduler.error = "cluster_peer: not shared memory that both blocks have taken";
  to_scheduler();
  return nullptr;
}

}  // namespace adamix::host
