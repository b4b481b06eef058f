// mma, and the loads and stores of 8x8 tiles that feed it. Products are summed exactly and rounded once.
#include <cstring>

#include "memory.h"
#include "numbers.h"
#include "registers.h"

namespace ptx {
namespace {

// Where a lane's values of the 16x8 accumulator lie.
int row_of(int lane, int value) { return (lane >> 2) + 8 * (value >> 1); }
int column_of(int lane, int value) { return 2 * (lane & 3) + (value & 1); }

// A product of 16 x K by K x 8. a, b: bits of the rows and columns that hold something undefined.
template <int K>
struct Tile {
  float a[16][K], b[K][8];
  u32 bad_rows = 0, bad_columns = 0;
};

// in: four registers of A, two of B, four of C.
template <int K>
void multiply(Warp& w, Instruction& i, const Tile<K>& t) {
  double sum[16][8];
  for (int v = 0; v < 4; v++)
    for (int l = 0; l < kLanes; l++) sum[row_of(l, v)][column_of(l, v)] = lanes<float>(w, i.in[6 + v])[l];
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < K; k++)
      for (int c = 0; c < 8; c++) sum[r][c] += static_cast<double>(t.a[r][k]) * t.b[k][c];
  for (int v = 0; v < 4; v++) {
    Mask bad = undefined(w, i.in[6 + v]);
    for (int l = 0; l < kLanes; l++) {
      int r = row_of(l, v), c = column_of(l, v);
      lanes<float>(w, i.out[v])[l] = static_cast<float>(sum[r][c]);
      if ((t.bad_rows >> r & 1) | (t.bad_columns >> c & 1)) bad |= 1u << l;
    }
    set_undefined(w, i.out[v], kAll, bad);
  }
  w.block->launch->products++;
}

template <class H>
void multiply_halves(Warp& w, Instruction& i, Mask m) {
  need_whole_warp(w, i, m);
  Tile<16> t;
  for (int l = 0; l < kLanes; l++) {
    for (int v = 0; v < 4; v++) {
      u32 pair = lanes<u32>(w, i.in[v])[l];
      int r = (l >> 2) + 8 * (v & 1), k = 2 * (l & 3) + 8 * (v >> 1);
      t.a[r][k] = H::widen(static_cast<u16>(pair)), t.a[r][k + 1] = H::widen(static_cast<u16>(pair >> 16));
      t.bad_rows |= (undefined(w, i.in[v]) >> l & 1) << r;
    }
    for (int v = 0; v < 2; v++) {
      u32 pair = lanes<u32>(w, i.in[4 + v])[l];
      int k = 2 * (l & 3) + 8 * v, c = l >> 2;
      t.b[k][c] = H::widen(static_cast<u16>(pair)), t.b[k + 1][c] = H::widen(static_cast<u16>(pair >> 16));
      t.bad_columns |= (undefined(w, i.in[4 + v]) >> l & 1) << c;
    }
  }
  multiply(w, i, t);
}

void multiply_tf32(Warp& w, Instruction& i, Mask m) {
  need_whole_warp(w, i, m);
  Tile<8> t;
  for (int l = 0; l < kLanes; l++) {
    for (int v = 0; v < 4; v++) {
      int r = (l >> 2) + 8 * (v & 1);
      t.a[r][(l & 3) + 4 * (v >> 1)] = cut_to_tf32(lanes<u32>(w, i.in[v])[l]);
      t.bad_rows |= (undefined(w, i.in[v]) >> l & 1) << r;
    }
    for (int v = 0; v < 2; v++) {
      t.b[(l & 3) + 4 * v][l >> 2] = cut_to_tf32(lanes<u32>(w, i.in[4 + v])[l]);
      t.bad_columns |= (undefined(w, i.in[4 + v]) >> l & 1) << (l >> 2);
    }
  }
  multiply(w, i, t);
}

// The two 16-bit places of a lane in an 8x8 tile, its registers' own or transposed.
template <class F>
void for_places(bool transposed, int lane, F f) {
  int q = lane >> 2, t = 2 * (lane & 3);
  for (int half = 0; half < 2; half++) transposed ? f(t + half, q, half) : f(q, t + half, half);
}

void find_rows(Warp& w, Instruction& i, Mask m, u32* at) {
  need_whole_warp(w, i, m);
  Mask used = i.imm[1] == 4 ? kAll : (1u << 8 * i.imm[1]) - 1;
  need_defined(w, i, i.in[0], used, "an address that nobody set");
  for (int l = 0; l < kLanes; l++) at[l] = static_cast<u32>(get(w, i.in[0], l) + i.imm[0]);
  for (int k = 0; k < i.imm[1] && w.block->launch->statistics; k++) count_rows(i, at, 8 * k);
}

// in[0]: address of a row, by lane; imm: offset, tiles, whether transposed.
void load_tiles(Warp& w, Instruction& i, Mask m) {
  u32 at[kLanes];
  find_rows(w, i, m, at);
  for (int tile = 0; tile < i.imm[1]; tile++) {
    u16 values[8][8];
    bool defined[8][8];
    for (int r = 0; r < 8; r++) {
      u32 row = at[8 * tile + r];
      bool fine = check_shared(w, i, row, 16, 8 * tile + r, false);
      memset(values[r], kPoison, 16);
      if (fine) memcpy(values[r], &w.block->shared[row], 16);
      for (int c = 0; c < 8; c++) defined[r][c] = !fine || is_defined(*w.block, row + 2 * c, 2);
    }
    Parts bad = {};
    for (int l = 0; l < kLanes; l++) {
      u32 v = 0;
      for_places(i.imm[2], l, [&](int r, int c, int half) {
        v |= static_cast<u32>(values[r][c]) << 16 * half;
        if (!defined[r][c]) bad[half] |= 1u << l;
      });
      lanes<u32>(w, i.out[tile])[l] = v;
    }
    set_undefined(w, i.out[tile], kAll, bad);
  }
}

// An 8x8 tile's registers, transposed.
void turn_tile(Warp& w, Instruction& i, Mask m) {
  need_whole_warp(w, i, m);
  u16 values[8][8];
  bool bad[8][8];
  Parts held = undefined_parts(w, i.in[0]), all = {};
  for (int l = 0; l < kLanes; l++)
    for_places(false, l, [&](int r, int c, int half) {
      values[r][c] = static_cast<u16>(lanes<u32>(w, i.in[0])[l] >> 16 * half);
      bad[r][c] = held[half] >> l & 1;
    });
  for (int l = 0; l < kLanes; l++) {
    u32 v = 0;
    for_places(true, l, [&](int r, int c, int half) {
      v |= static_cast<u32>(values[r][c]) << 16 * half;
      if (bad[r][c]) all[half] |= 1u << l;
    });
    lanes<u32>(w, i.out[0])[l] = v;
  }
  set_undefined(w, i.out[0], kAll, all);
}

// in[1] and on: the tiles.
void store_tiles(Warp& w, Instruction& i, Mask m) {
  u32 at[kLanes];
  find_rows(w, i, m, at);
  for (int tile = 0; tile < i.imm[1]; tile++) {
    u16 values[8][8];
    bool defined[8][8];
    Parts bad = undefined_parts(w, i.in[1 + tile]);
    for (int l = 0; l < kLanes; l++)
      for_places(i.imm[2], l, [&](int r, int c, int half) {
        values[r][c] = static_cast<u16>(lanes<u32>(w, i.in[1 + tile])[l] >> 16 * half);
        defined[r][c] = !(bad[half] >> l & 1);
      });
    for (int r = 0; r < 8; r++) {
      u32 row = at[8 * tile + r];
      if (!check_shared(w, i, row, 16, 8 * tile + r, true, reinterpret_cast<u8*>(values[r]))) continue;
      memcpy(&w.block->shared[row], values[r], 16);
      for (int c = 0; c < 8; c++) set_defined(*w.block, row + 2 * c, 2, defined[r][c]);
    }
  }
}

}  // namespace

void add_matrices() {
  add_own("mma.f16", multiply_halves<Half>, Kind::collective);
  add_own("mma.bf16", multiply_halves<Bfloat>, Kind::collective);
  add_own("mma.tf32", multiply_tf32, Kind::collective);
  add_own("ldmatrix", load_tiles, Kind::collective);
  add_own("stmatrix", store_tiles, Kind::collective);
  add_own("movmatrix", turn_tile, Kind::collective);
}

}  // namespace ptx
