// wmma, for counting: fragments lie in the registers in an order of their own, as PTX leaves it open; and parameters
// that are found by an address.
#include <cstring>

#include "memory.h"
#include "numbers.h"
#include "registers.h"

namespace ptx {
namespace {

constexpr int kSide = 16, kElements = kSide * kSide / kLanes;

// Element k of a lane: its row and column.
int row_of(int lane, int k) { return (lane * kElements + k) / kSide; }
int column_of(int lane, int k) { return (lane * kElements + k) % kSide; }

// The first element and the elements from one line to the next; imm: offset, whether columns are the lines.
struct Place {
  u32 base, pitch;
  bool columns;

  u32 at(int row, int column, int bytes) const {
    return base + static_cast<u32>((columns ? column * pitch + row : row * pitch + column) * bytes);
  }
};

Place place(Warp& w, const Instruction& i, size_t stride) {
  return {static_cast<u32>(get(w, i.in[0], 0) + static_cast<u64>(i.imm[0])), static_cast<u32>(get(w, i.in[stride], 0)),
          i.imm[1] != 0};
}

// Passes of the 16-byte rows of halves, eight at a time, as ldmatrix takes them.
void count_halves(Warp& w, Instruction& i, const Place& p) {
  if (!w.block->launch->statistics) return;
  u32 rows[32];
  for (int n = 0; n < 32; n++) rows[n] = p.base + (n % kSide) * p.pitch * 2 + n / kSide * 16;
  for (int first = 0; first < 32; first += 8) count_rows(i, rows, first);
}

// Passes of a float32 tile: a lane has two neighbours of a row, four times.
void count_floats(Warp& w, Instruction& i, const Place& p) {
  if (!w.block->launch->statistics) return;
  for (int part = 0; part < 4; part++) {
    u32 addresses[kLanes];
    for (int l = 0; l < kLanes; l++) addresses[l] = p.at(l / 4 + 8 * (part & 1), l % 4 * 2 + 8 * (part >> 1), 4);
    count_shared(i, addresses, 8, kAll);
  }
}

// Fragments of float16 hold a value in a register, those of bfloat16 two.
template <int PerRegister>
void load_halves(Warp& w, Instruction& i, Mask m) {
  need_whole_warp(w, i, m);
  Place p = place(w, i, 1);
  count_halves(w, i, p);
  for (int l = 0; l < kLanes; l++)
    for (int k = 0; k < kElements; k++) {
      u32 address = p.at(row_of(l, k), column_of(l, k), 2);
      u16 value = 0;
      if (check_shared(w, i, address, 2, l, false)) memcpy(&value, &w.block->shared[address], 2);
      u32& to = lanes<u32>(w, i.out[k / PerRegister])[l];
      to = k % PerRegister ? (to & 0xffff) | static_cast<u32>(value) << 16 : value;
    }
  for (const Operand& o : i.out) set_undefined(w, o, kAll, 0);
}

void load_floats(Warp& w, Instruction& i, Mask m) {
  need_whole_warp(w, i, m);
  Place p = place(w, i, 1);
  count_floats(w, i, p);
  for (int l = 0; l < kLanes; l++)
    for (int k = 0; k < kElements; k++) {
      u32 address = p.at(row_of(l, k), column_of(l, k), 4);
      if (check_shared(w, i, address, 4, l, false)) memcpy(&lanes<u32>(w, i.out[k])[l], &w.block->shared[address], 4);
    }
  for (const Operand& o : i.out) set_undefined(w, o, kAll, 0);
}

void store_floats(Warp& w, Instruction& i, Mask m) {
  need_whole_warp(w, i, m);
  Place p = place(w, i, 1 + kElements);
  count_floats(w, i, p);
  for (int l = 0; l < kLanes; l++)
    for (int k = 0; k < kElements; k++) {
      u32 address = p.at(row_of(l, k), column_of(l, k), 4);
      if (!check_shared(w, i, address, 4, l, true)) continue;
      memcpy(&w.block->shared[address], &lanes<u32>(w, i.in[1 + k])[l], 4);
      set_defined(*w.block, address, 4, true);
    }
}

template <class H, int PerRegister>
void multiply(Warp& w, Instruction& i, Mask m) {
  need_whole_warp(w, i, m);
  constexpr int kRegisters = kElements / PerRegister;
  float a[kSide][kSide], b[kSide][kSide];
  for (int l = 0; l < kLanes; l++)
    for (int k = 0; k < kElements; k++) {
      int shift = k % PerRegister * 16, n = k / PerRegister, r = row_of(l, k), c = column_of(l, k);
      a[r][c] = H::widen(static_cast<u16>(lanes<u32>(w, i.in[n])[l] >> shift));
      b[r][c] = H::widen(static_cast<u16>(lanes<u32>(w, i.in[kRegisters + n])[l] >> shift));
    }
  for (int l = 0; l < kLanes; l++)
    for (int k = 0; k < kElements; k++) {
      double sum = lanes<float>(w, i.in[2 * kRegisters + k])[l];
      for (int n = 0; n < kSide; n++) sum += static_cast<double>(a[row_of(l, k)][n]) * b[n][column_of(l, k)];
      lanes<float>(w, i.out[k])[l] = static_cast<float>(sum);
    }
  for (const Operand& o : i.out) set_undefined(w, o, kAll, 0);
  w.block->launch->products += 2;
}

// out = the parameters' address + imm.
void parameter_address(Warp& w, Instruction& i, Mask m) {
  u64 at = reinterpret_cast<u64>(w.block->launch->parameters) + static_cast<u64>(i.imm[0]);
  for_lanes(m, [&](int l) { put(w, i.out[0], l, at); });
}

// imm: offset, bytes, whether signed; in: an address made of the one above.
void parameter_at(Warp& w, Instruction& i, Mask m) {
  int bytes = static_cast<int>(i.imm[1]), shift = 64 - 8 * bytes;
  for_lanes(m, [&](int l) {
    u64 v = 0;
    memcpy(&v, reinterpret_cast<const u8*>(get(w, i.in[0], l) + static_cast<u64>(i.imm[0])), bytes);
    if (i.imm[2] && shift) v = static_cast<u64>(static_cast<s64>(v << shift) >> shift);
    put(w, i.out[0], l, v);
  });
}

}  // namespace

void add_wmma() {
  add_own("wmma.load.f16", load_halves<1>, Kind::collective),
      add_own("wmma.load.bf16", load_halves<2>, Kind::collective);
  add_own("wmma.load.f32", load_floats, Kind::collective), add_own("wmma.store.f32", store_floats, Kind::collective);
  add_own("wmma.mma.f16", multiply<Half, 1>, Kind::collective);
  add_own("wmma.mma.bf16", multiply<Bfloat, 2>, Kind::collective);
  add("param", parameter_address), add("ld.param.at", parameter_at);
  // Rounded down: the last bit is not what is counted.
  lanewise<[](float a, float b, float c) -> float { return std::fmaf(a, b, c); }>("fma.rm.f32");
}

}  // namespace ptx
