// What every part of the executor shares: a program's instructions, the warps that run them, what a launch finds.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using Mask = u32;  // a bit for each lane

constexpr int kLanes = 32;
constexpr Mask kAll = ~0u;
using Parts = std::array<Mask, 4>;  // of a register's 16-bit parts
constexpr u8 kPoison = 0xff;        // NaN in every floating format

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, Instruction&, Mask);

// collective: waits for all lanes of the warp. call: of a function; back: to where it was called.
enum class Kind { plain, collective, branch, call, back, leave, barrier, wgmma_wait };

// offset: into a warp's registers, -1 where nothing is given. shadow: its number in Warp::undefined, 0 for a constant.
struct Operand {
  int offset = -1, shadow = 0, bytes = 0;
};

struct Statistics {
  u64 executed = 0, sectors = 0, least_sectors = 0, bytes = 0, waves = 0, least_waves = 0, distant = 0;
};

struct Instruction {
  Handler run = nullptr;
  Kind kind = Kind::plain;
  bool spreads = true;  // a result is undefined where an input is; else the handler says so itself
  bool negated = false;
  int line = 0, target = 0;
  Operand guard;
  s64 imm[8] = {};
  std::vector<Operand> out, in;
  mutable Statistics stats;
};

struct Program {
  std::vector<Instruction> code;
  std::vector<u8> image;  // constants and special registers, the beginning of every warp's registers
  size_t register_bytes = 0;
  int registers = 0;       // entries of Warp::undefined
  int functions = 0;       // where the functions begin that are called
  int special[9] = {};     // offsets: tid.x, laneid, ctaid.xyz, nctaid.xyz, ntid.x
  std::vector<s64> reuse;  // of the last launch: of each range its first reads and writes, then the distances
};

struct Report {
  std::string kind, first;
  int line = 0;
  s64 times = 0;
};

struct Free {
  void operator()(void* at) const { free(at); }
};
// Zeros, which take no memory until they are written.
using Clocks = std::unique_ptr<u32[], Free>;

// Global memory that a launch may touch; touched: a byte for each 32-byte sector, 1 read from outside, 2 written.
// read_at, written_at: of each sector, when (Launch::clock). first_reads, first_writes: sectors, the first of a block.
struct Range {
  u64 low, high;
  std::vector<u8> touched;
  Clocks read_at, written_at;
  s64 first_reads = 0, first_writes = 0;
};

// Sectors that a block brought in last, which its multiprocessor's L1 is taken to hold: 32 KB.
constexpr u32 kNear = 1024;

// Buckets of the distances at which a block reads a sector again, four to a power of two.
constexpr int kDistances = 128;

// Who wrote and read a byte of global memory last: block, barriers passed, warp (255: several).
struct GlobalByte {
  s32 written_block = -1, read_block = -1;
  u32 written_epoch = 0, read_epoch = 0;
  u8 written_warp = 0, read_warp = 0;
};

struct SharedByte {
  u32 written_epoch = 0, read_epoch = 0, readers = 0;
  u8 written_warp = 0, in_flight = 0, written = 0, defined = 0;
};

struct AsyncCopy {
  u32 to;
  u8 bytes, data[16];
};

struct Wgmma {
  const Instruction* instruction;
  u64 a, b;  // descriptors
  u32 a_registers[4][kLanes];
  Mask a_undefined;
  bool scale_d;
};

struct Launch;

struct Block {
  Launch* launch;
  Program* program;
  std::vector<u8> shared;
  std::vector<SharedByte> shadow;
  u32 epoch;  // barriers passed
  int linear, index[3];
  std::vector<Warp> warps;
};

enum class State { running, at_barrier, done, at_wgmma_wait };

struct Warp {
  u8* registers;
  std::vector<Mask> undefined;  // of every register, the lanes whose value, or a part of it, nobody set,
  std::vector<Parts> parts;     // and in those lanes which parts
  Block* block;
  int id;
  Mask alive;
  bool diverged;
  int pc, lane_pc[kLanes];
  State state;
  std::vector<AsyncCopy> open_copies;
  std::vector<std::vector<AsyncCopy>> copy_groups;
  std::vector<Wgmma> open_wgmmas;
  std::vector<std::vector<Wgmma>> wgmma_groups;
  s64 wgmma_done;
  int pending_wgmmas;        // issued and not yet computed,
  std::vector<u16> pending;  // and how many of them will write a register
};

struct Launch {
  std::vector<Range> ranges;
  size_t last_range = 0;
  std::map<std::pair<std::string, int>, Report> reports;
  bool statistics, races, late;  // late: a wgmma reads when it is waited for, else when it is issued
  bool zeros;                    // shared memory begins as zeros
  u64 limit, instructions = 0, products = 0, barriers = 0;
  bool stopped = false;
  std::unordered_map<u64, std::vector<GlobalByte>> global_shadow;  // by Range::low
  std::map<int, std::pair<u32, int>> atomics;                      // block -> epoch and warp of its last one
  const u8* parameters;
  std::mt19937 random;
  // Sectors that blocks have brought in so far, and how many of them before this one; of every sector that a block
  // reads again, how many it brought in since.
  u32 clock = 0, began = 0;
  s64 distances[kDistances] = {};
};

// Says once per kind and line where it was seen first, and counts.
void report(Warp& w, const Instruction& i, const char* kind, u64 address, int lane, const std::string& more = "");

// Runs a block to its end; order of its warps: 0 forward, 1 backward, 2 random slices.
void run_block(Block& block, int order);

}  // namespace ptx
