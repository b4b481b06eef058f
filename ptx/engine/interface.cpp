// The C functions that Python calls.
#include <algorithm>
#include <cstring>

#include "memory.h"
#include "registers.h"

namespace ptx {

std::unordered_map<std::string, Entry>& table() {
  static std::unordered_map<std::string, Entry> entries;
  return entries;
}

void report(Warp& w, const Instruction& i, const char* kind, u64 address, int lane, const std::string& more) {
  Report& r = w.block->launch->reports[{kind, i.line}];
  if (!r.times++) {
    const int* at = w.block->index;
    char text[512];
    snprintf(text, sizeof text, "block (%d, %d, %d) warp %d lane %d address 0x%llx %s", at[0], at[1], at[2], w.id, lane,
             static_cast<unsigned long long>(address), more.c_str());
    r.kind = kind, r.line = i.line, r.first = text;
  }
}

namespace {

void fill_table() {
  if (!table().empty()) return;
  add_integers(), add_floats(), add_halves(), add_conversions(), add_moves(), add_comparisons(), add_calls();
  add_memory(), add_async_copies(), add_matrices(), add_wgmma(), add_wmma(), add_collectives();
}

Operand operand(const s64* row) {
  Operand o;
  o.offset = static_cast<int>(row[0]), o.shadow = static_cast<int>(row[1]), o.bytes = static_cast<int>(row[2]);
  return o;
}

std::string joined(const Launch& launch) {
  std::string text;
  for (const auto& [key, r] : launch.reports)
    text += r.kind + "\t" + std::to_string(r.line) + "\t" + std::to_string(r.times) + "\t" + r.first + "\n";
  return text;
}

// Grid and block size, the same for all warps.
void set_sizes(Program& p, const int* grid, int warps) {
  for (int l = 0; l < kLanes; l++) {
    for (int axis = 0; axis < 3; axis++) reinterpret_cast<u32*>(p.image.data() + p.special[5 + axis])[l] = grid[axis];
    reinterpret_cast<u32*>(p.image.data() + p.special[8])[l] = warps * kLanes;
  }
}

}  // namespace
}  // namespace ptx

using namespace ptx;

extern "C" {

// rows: 12 numbers an instruction: line, target, whether the guard is negated, outputs, inputs, imm[0] to [6].
// operands: 3 numbers each (offset, shadow, bytes): of every instruction its guard, outputs, inputs.
// error: names that the executor does not know. registers: entries of Warp::undefined. functions: of the instructions,
// the first of a function that is called.
Program* ptx_load(int count, const char* names, const s64* rows, const s64* operands, const u8* image, s64 image_bytes,
                  s64 register_bytes, int registers, int functions, const int* special, char* error, int error_bytes) {
  fill_table();
  auto* p = new Program;
  p->image.assign(image, image + image_bytes);
  p->register_bytes = register_bytes, p->registers = registers, p->functions = functions;
  memcpy(p->special, special, sizeof p->special);
  std::string unknown;
  for (int n = 0; n < count; n++, rows += 12) {
    const char* end = strchr(names, '\n');
    std::string name(names, end);
    names = end + 1;
    Instruction i;
    auto entry = table().find(name);
    if (entry == table().end())
      unknown += name + " ";
    else
      i.run = entry->second.run, i.kind = entry->second.kind, i.spreads = entry->second.spreads;
    i.line = static_cast<int>(rows[0]), i.target = static_cast<int>(rows[1]), i.negated = rows[2];
    memcpy(i.imm, rows + 5, 7 * sizeof(s64));
    i.guard = operand(operands), operands += 3;
    for (s64 k = 0; k < rows[3]; k++, operands += 3) i.out.push_back(operand(operands));
    for (s64 k = 0; k < rows[4]; k++, operands += 3) i.in.push_back(operand(operands));
    p->code.push_back(std::move(i));
  }
  snprintf(error, error_bytes, "%s", unknown.c_str());
  return p;
}

void ptx_free(Program* p) { delete p; }

// options: order of warps (0 forward, 1 backward, 2 random slices), seed, statistics, races, late wgmma, the most
// instructions, after how many no more blocks begin, and whether shared memory begins as zeros. blocks: their linear
// numbers, in the order they run. ranges: low and high of each. counts: instructions, products, barriers, reports,
// blocks that ran. touched: sectors of each range, read from outside and written. out: the reports, a line each, as
// many as it holds.
void ptx_launch(Program* p, int warps, s64 shared_bytes, const int* grid, const s64* blocks, s64 block_count,
                const u8* parameters, const u64* ranges, int range_count, const s64* options, char* out, s64 out_bytes,
                s64* counts, s64* touched) {
  Launch launch;
  launch.statistics = options[2], launch.races = options[3], launch.late = options[4], launch.limit = options[5];
  launch.zeros = options[7];
  launch.parameters = parameters;
  launch.random.seed(static_cast<u32>(options[1]));
  for (int k = 0; k < range_count; k++)
    launch.ranges.emplace_back(), launch.ranges[k].low = ranges[2 * k], launch.ranges[k].high = ranges[2 * k + 1];
  for (Instruction& i : p->code) i.stats = Statistics();
  set_sizes(*p, grid, warps);
  Block b;
  b.launch = &launch, b.program = p;
  b.shared.resize(shared_bytes), b.shadow.resize(shared_bytes), b.warps.resize(warps);
  std::vector<std::vector<u64>> registers(warps, std::vector<u64>(p->register_bytes / 8 + 16));
  for (int n = 0; n < warps; n++)
    b.warps[n].registers = reinterpret_cast<u8*>((reinterpret_cast<u64>(registers[n].data()) + 63) & ~63ull);
  u64 enough = options[6];
  s64 ran = 0;
  for (s64 n = 0; n < block_count && !launch.stopped && launch.instructions < enough; n++, ran++) {
    launch.began = launch.clock;
    b.linear = static_cast<int>(blocks[n]);
    b.index[0] = b.linear % grid[0], b.index[1] = b.linear / grid[0] % grid[1],
    b.index[2] = b.linear / grid[0] / grid[1];
    run_block(b, static_cast<int>(options[0]));
  }
  std::string text = joined(launch);
  snprintf(out, out_bytes, "%s", text.c_str());
  counts[0] = launch.instructions, counts[1] = launch.products, counts[2] = launch.barriers;
  counts[3] = launch.reports.size(), counts[4] = ran;
  p->reuse.clear();
  for (const Range& r : launch.ranges) p->reuse.push_back(r.first_reads), p->reuse.push_back(r.first_writes);
  p->reuse.insert(p->reuse.end(), launch.distances, launch.distances + kDistances);
  for (int k = 0; k < range_count; k++) {
    touched[2 * k] = touched[2 * k + 1] = 0;
    for (u8 t : launch.ranges[k].touched) touched[2 * k] += t & 1, touched[2 * k + 1] += t >> 1 & 1;
  }
}

// Of every instruction of the last launch: executions, sectors, least sectors, bytes, waves, least waves, and sectors
// that it loads and that its block did not touch lately.
void ptx_statistics(Program* p, s64* out) {
  for (const Instruction& i : p->code) {
    const Statistics& s = i.stats;
    for (u64 v : {s.executed, s.sectors, s.least_sectors, s.bytes, s.waves, s.least_waves, s.distant})
      *out++ = static_cast<s64>(v);
  }
}

// Of the last launch: sectors that blocks read first and wrote first, summed over blocks, for each range; then, in 128
// buckets, four to a power of two, sectors read again by the block that had them: by how many others it had since.
void ptx_reuse(Program* p, s64* out) { std::copy(p->reuse.begin(), p->reuse.end(), out); }
}
