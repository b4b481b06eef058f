// wgmma: four warps multiply 64 rows; it may read shared memory at any time until it is waited for.
//
// imm: columns N, format (0 float16, 1 bfloat16, 2 tf32), whether A is in registers, scale-d where it is a constant
// (else -1), A transposed, B transposed, the sign of the product. out: N/2 accumulators; in: A (a descriptor or four
// registers), the descriptor of B, scale-d where it is no constant.
#include <cstring>

#include "memory.h"
#include "numbers.h"
#include "registers.h"

namespace ptx {
namespace {

constexpr int kMostColumns = 256, kRows = 16, kMostDepth = 16;

// Address of the element (mn, k) of a matrix in shared memory.
u32 element_address(u64 descriptor, int mn, int k, int size, bool transposed) {
  auto field = [&](int shift) { return static_cast<u32>(descriptor >> shift & 0x3fff) << 4; };
  u32 start = field(0), leading = field(16), stride = field(32), mode = static_cast<u32>(descriptor >> 62), at;
  constexpr u32 widths[] = {16, 128, 64, 32}, masks[] = {0, 7, 3, 1};
  u32 width = widths[mode], k_bytes = k * size, mn_bytes = mn * size;
  if (!transposed)
    at = start + mn % 8 * width + mn / 8 * stride + (mode ? k_bytes : k_bytes % 16 + k_bytes / 16 * leading);
  else
    at = start + mn_bytes % width + (mode ? mn_bytes / width * leading : mn_bytes / 16 * stride) + k % 8 * width +
         k / 8 * (mode ? stride : leading);
  return at ^ ((at >> 7 & masks[mode]) << 4);
}

struct Operands {
  float a[kRows][kMostDepth], b[kMostDepth][kMostColumns];
  bool bad_row[kRows], bad_column[kMostColumns];
};

float read_element(Warp& w, const Instruction& i, u32 address, bool* bad) {
  Block& b = *w.block;
  int size = i.imm[1] == 2 ? 4 : 2;
  if (static_cast<u64>(address) + size > b.shared.size()) {
    report(w, i, "wgmma reads shared memory out of bounds", address, 0);
    return NAN;
  }
  if (!is_defined(b, address, size)) *bad = true;
  if (b.shadow[address].in_flight) report(w, i, "wgmma reads under a cp.async in flight", address, 0);
  for (int k = 0; k < size && b.launch->races; k++) {
    SharedByte& s = b.shadow[address + k];
    if (s.written_epoch == b.epoch && s.written && s.written_warp != w.id)
      report(w, i, "shared race: wgmma reads after another warp's write", address, 0);
    if (s.read_epoch != b.epoch) s.read_epoch = b.epoch, s.readers = 0;
    s.readers |= 1u << w.id;
  }
  u32 v = 0;
  memcpy(&v, &b.shared[address], size);
  if (i.imm[1] == 2) return cut_to_tf32(v);
  return i.imm[1] ? Bfloat::widen(static_cast<u16>(v)) : Half::widen(static_cast<u16>(v));
}

void place_a_registers(const Wgmma& g, Operands& o) {
  s64 format = g.instruction->imm[1];
  for (int l = 0; l < kLanes; l++)
    for (int v = 0; v < 4; v++) {
      u32 bits = g.a_registers[v][l];
      int r = (l >> 2) + 8 * (v & 1);
      o.bad_row[r] |= g.a_undefined >> l & 1;
      if (format == 2) {
        o.a[r][(l & 3) + 4 * (v >> 1)] = cut_to_tf32(bits);
        continue;
      }
      int k = 2 * (l & 3) + 8 * (v >> 1);
      u16 low = static_cast<u16>(bits), high = static_cast<u16>(bits >> 16);
      o.a[r][k] = format ? Bfloat::widen(low) : Half::widen(low);
      o.a[r][k + 1] = format ? Bfloat::widen(high) : Half::widen(high);
    }
}

// A warp computes its 16 of the 64 rows.
void compute(Warp& w, const Wgmma& g) {
  const Instruction& i = *g.instruction;
  int columns = static_cast<int>(i.imm[0]), size = i.imm[1] == 2 ? 4 : 2, depth = i.imm[1] == 2 ? 8 : 16;
  static thread_local Operands o;
  memset(o.bad_row, 0, sizeof o.bad_row), memset(o.bad_column, 0, sizeof o.bad_column);
  if (i.imm[2])
    place_a_registers(g, o);
  else
    for (int r = 0; r < kRows; r++)
      for (int k = 0; k < depth; k++)
        o.a[r][k] = read_element(w, i, element_address(g.a, 16 * (w.id % 4) + r, k, size, i.imm[4]), &o.bad_row[r]);
  for (int n = 0; n < columns; n++)
    for (int k = 0; k < depth; k++)
      o.b[k][n] = read_element(w, i, element_address(g.b, n, k, size, i.imm[5]), &o.bad_column[n]);
  double sign = static_cast<double>(i.imm[6]);
  for (int r = 0; r < kRows; r++) {
    double sum[kMostColumns];
    auto accumulator = [&](int n) -> const Operand& { return i.out[4 * (n / 8) + 2 * (r / 8) + (n & 1)]; };
    auto lane = [&](int n) { return r % 8 * 4 + n % 8 / 2; };
    for (int n = 0; n < columns; n++) sum[n] = g.scale_d ? lanes<float>(w, accumulator(n))[lane(n)] : 0.0;
    for (int k = 0; k < depth; k++) {
      double a = o.a[r][k] * sign;
      for (int n = 0; n < columns; n++) sum[n] += a * o.b[k][n];
    }
    for (int n = 0; n < columns; n++) {
      lanes<float>(w, accumulator(n))[lane(n)] = static_cast<float>(sum[n]);
      Mask bit = 1u << lane(n), before = g.scale_d ? undefined(w, accumulator(n)) : 0;
      bool bad = o.bad_row[r] || o.bad_column[n] || before & bit;
      set_undefined(w, accumulator(n), bit, bad ? bit : 0);
    }
  }
  w.block->launch->products += columns / 8;
}

// All lanes hold the same one.
u64 descriptor(Warp& w, const Instruction& i, const Operand& o) {
  need_defined(w, i, o, kAll, "an address that nobody set");
  return lanes<u64>(w, o)[0];
}

void issue(Warp& w, Instruction& i, Mask m) {
  need_whole_warp(w, i, m);
  Wgmma g{&i, 0, 0, {}, 0, false};
  size_t at = 0;
  if (i.imm[2])
    for (; at < 4; at++) {
      memcpy(g.a_registers[at], lanes<u32>(w, i.in[at]), sizeof g.a_registers[at]);
      g.a_undefined |= undefined(w, i.in[at]);
    }
  else
    g.a = descriptor(w, i, i.in[at++]);
  g.b = descriptor(w, i, i.in[at++]);
  if (i.imm[3] < 0) need_defined(w, i, i.in[at], kAll, "a predicate that nobody set");
  g.scale_d = i.imm[3] >= 0 ? i.imm[3] : predicate(w, i.in[at]) & 1;
  if (!w.block->launch->late) return compute(w, g);
  for (const Operand& o : i.out) w.pending[o.shadow]++;
  w.pending_wgmmas++;
  w.open_wgmmas.push_back(g);
}

void wake(Block& b, int group) {
  for (Warp& v : b.warps)
    if (v.id / 4 == group && v.state == State::at_wgmma_wait) v.state = State::running;
}

void commit(Warp& w, Instruction&, Mask) {
  w.wgmma_groups.push_back(std::move(w.open_wgmmas));
  w.open_wgmmas.clear();
  wake(*w.block, w.id / 4);
}

}  // namespace

bool finish_wgmmas(Warp& w, const Instruction& i) {
  // One operation of four warps: it ends for all of them at once, and not before each of them has issued it.
  s64 target = w.wgmma_done + static_cast<s64>(w.wgmma_groups.size()) - i.imm[0];
  if (target <= w.wgmma_done) return true;
  auto of_group = [&](const Warp& v) { return v.id / 4 == w.id / 4; };
  for (Warp& v : w.block->warps)
    if (of_group(v) && v.wgmma_done + static_cast<s64>(v.wgmma_groups.size()) < target) return false;
  for (Warp& v : w.block->warps)
    for (; of_group(v) && v.wgmma_done < target; v.wgmma_done++) {
      for (const Wgmma& g : v.wgmma_groups.front()) {
        compute(v, g);
        for (const Operand& o : g.instruction->out) v.pending[o.shadow]--;
        v.pending_wgmmas--;
      }
      v.wgmma_groups.erase(v.wgmma_groups.begin());
    }
  return true;
}

void add_wgmma() {
  add_own("wgmma", issue, Kind::collective);
  add_own("wgmma.commit", commit, Kind::collective);
  add_own("wgmma.wait", nullptr, Kind::wgmma_wait);
}

}  // namespace ptx
