// Warps and blocks: divergence, barriers, in which order warps run.
#include <algorithm>
#include <climits>
#include <cstring>

#include "memory.h"
#include "registers.h"

namespace ptx {
namespace {

// Lanes that run next, all at one instruction: those in a function, then those furthest behind; at a collective
// instruction lanes wait for the rest.
Mask next_lanes(Warp& w, const Program& program, int* pc) {
  const std::vector<Instruction>& code = program.code;
  int ready = INT_MAX, waiting = INT_MAX;
  Mask ready_lanes = 0, waiting_lanes = 0;
  auto before = [&](int a, int b) {
    bool in_a = a >= program.functions && a != INT_MAX, in_b = b >= program.functions && b != INT_MAX;
    return in_a != in_b ? in_a : a < b;
  };
  for_lanes(w.alive, [&](int l) {
    bool waits = code[w.lane_pc[l]].kind >= Kind::barrier || code[w.lane_pc[l]].kind == Kind::collective;
    int& best = waits ? waiting : ready;
    Mask& lanes = waits ? waiting_lanes : ready_lanes;
    if (before(w.lane_pc[l], best)) best = w.lane_pc[l], lanes = 0;
    if (w.lane_pc[l] == best) lanes |= 1u << l;
  });
  *pc = ready_lanes ? ready : waiting;
  if (!ready_lanes && waiting_lanes != w.alive)
    report(w, code[waiting], "lanes of a warp at different collective instructions", waiting_lanes, 0);
  return ready_lanes ? ready_lanes : waiting_lanes;
}

Mask guarded(Warp& w, const Instruction& i, Mask m) {
  if (i.guard.offset < 0) return m;
  need_defined(w, i, i.guard, m, "a predicate that nobody set");
  u32 p = predicate(w, i.guard);
  return m & (i.negated ? ~p : p);
}

void spread_undefined(Warp& w, const Instruction& i, Mask m) {
  Mask bad = 0;
  for (const Operand& o : i.in) bad |= undefined(w, o);
  for (const Operand& o : i.out) set_undefined(w, o, m, bad);
}

void check_pending(Warp& w, const Instruction& i) {
  bool used = false;
  for (const Operand& o : i.in) used |= w.pending[o.shadow];
  for (const Operand& o : i.out) used |= i.kind == Kind::plain && w.pending[o.shadow];
  if (used) report(w, i, "a wgmma's result used before it is waited for", 0, 0);
}

void step_to(Warp& w, Mask m, int pc) {
  if (!w.diverged)
    w.pc = pc;
  else
    for_lanes(m, [&](int l) { w.lane_pc[l] = pc; });
}

// From here on every lane has its own way.
void diverge(Warp& w, int pc) {
  if (!w.diverged) std::fill(w.lane_pc, w.lane_pc + kLanes, pc);
  w.diverged = true;
}

void branch(Warp& w, const Instruction& i, Mask m, Mask taken, int pc) {
  if (taken == m || !taken) return step_to(w, m, taken ? i.target : pc + 1);
  diverge(w, pc);
  for_lanes(m, [&](int l) { w.lane_pc[l] = taken >> l & 1 ? i.target : pc + 1; });
}

void call(Warp& w, const Instruction& i, Mask m, Mask active, int pc) {
  for_lanes(active, [&](int l) { put(w, i.out[0], l, static_cast<u64>(pc + 1)); });
  set_undefined(w, i.out[0], active, 0);
  branch(w, i, m, active, pc);
}

void go_back(Warp& w, const Instruction& i, Mask m, Mask active, int pc) {
  diverge(w, pc);
  for_lanes(m, [&](int l) { w.lane_pc[l] = active >> l & 1 ? static_cast<int>(get(w, i.in[0], l)) : pc + 1; });
}

void end(Warp& w, const Instruction& i) {
  w.state = State::done;
  if (!w.open_wgmmas.empty() || !w.wgmma_groups.empty()) report(w, i, "a wgmma that nobody waits for", 0, 0);
}

// Runs a warp until a barrier, its end, a wgmma that others have not issued, or so many instructions.
void run_warp(Warp& w, s64 most) {
  Program& program = *w.block->program;
  Launch& launch = *w.block->launch;
  for (s64 n = 0; n < most; n++) {
    if (launch.instructions++ > launch.limit) {
      launch.stopped = true;
      return report(w, program.code[0], "more instructions than the limit", launch.limit, 0);
    }
    Mask m = w.alive;
    int pc = w.pc;
    if (w.diverged) {
      m = next_lanes(w, program, &pc);
      if (m == w.alive) w.diverged = false, w.pc = pc;
    }
    Instruction& i = program.code[pc];
    Mask active = guarded(w, i, m);
    i.stats.executed++;
    if (w.pending_wgmmas) check_pending(w, i);
    switch (i.kind) {
      case Kind::plain:
      case Kind::collective:
        if (active) {
          i.run(w, i, active);
          if (i.spreads) spread_undefined(w, i, active);
        }
        break;
      case Kind::branch:
        branch(w, i, m, active, pc);
        continue;
      case Kind::call:
        call(w, i, m, active, pc);
        continue;
      case Kind::back:
        go_back(w, i, m, active, pc);
        continue;
      case Kind::leave:
        w.alive &= ~active;
        if (!w.alive) return end(w, i);
        break;
      case Kind::wgmma_wait:
        if (!finish_wgmmas(w, i)) {
          w.state = State::at_wgmma_wait;
          return;
        }
        break;
      case Kind::barrier:
        if (active != kAll) report(w, i, "a barrier without the whole warp", active, 0);
        if (!active) break;
        w.state = State::at_barrier;
        return step_to(w, m, pc + 1);
    }
    step_to(w, m, pc + 1);
  }
}

void start(Warp& w, Block& b, int id) {
  const Program& p = *b.program;
  w.block = &b, w.id = id, w.alive = kAll, w.diverged = false, w.pc = 0, w.state = State::running;
  w.open_copies.clear(), w.copy_groups.clear(), w.open_wgmmas.clear(), w.wgmma_groups.clear(), w.wgmma_done = 0;
  memset(w.registers, kPoison, p.register_bytes);
  memcpy(w.registers, p.image.data(), p.image.size());
  w.undefined.assign(p.registers, kAll);
  w.undefined[0] = 0;
  w.parts.assign(p.registers, {kAll, kAll, kAll, kAll});
  w.pending_wgmmas = 0, w.pending.assign(p.registers, 0);
  auto special = [&](int n) { return reinterpret_cast<u32*>(w.registers + p.special[n]); };
  for (int l = 0; l < kLanes; l++) {
    special(0)[l] = id * kLanes + l;
    special(1)[l] = l;
    for (int axis = 0; axis < 3; axis++) special(2 + axis)[l] = b.index[axis];
  }
}

// bar.red.or: every thread is given whether one of the block's says yes.
void combine(Block& b) {
  const std::vector<Instruction>& code = b.program->code;
  auto barrier = [&](const Warp& w) -> const Instruction* {
    if (w.state != State::at_barrier) return nullptr;
    const Instruction& i = code[(w.diverged ? w.lane_pc[__builtin_ctz(w.alive)] : w.pc) - 1];
    return i.in.empty() ? nullptr : &i;
  };
  bool yes = false, bad = false;
  for (Warp& w : b.warps)
    if (const Instruction* i = barrier(w))
      yes |= predicate(w, i->in[0]) & w.alive, bad |= undefined(w, i->in[0]) & w.alive;
  for (Warp& w : b.warps)
    if (const Instruction* i = barrier(w))
      set_predicate(w, i->out[0], w.alive, yes ? kAll : 0), set_undefined(w, i->out[0], w.alive, bad ? kAll : 0);
}

// Nobody can run: a barrier that all have reached opens; false where the block has ended.
bool open_barrier(Block& b) {
  int done = 0, stuck = 0;
  for (Warp& w : b.warps) done += w.state == State::done, stuck += w.state == State::at_wgmma_wait;
  const Instruction& first = b.program->code[0];
  if (done == static_cast<int>(b.warps.size())) return false;
  if (stuck) {
    report(b.warps[0], first, "a wgmma that not all warps of the group issue", 0, 0);
    for (Warp& w : b.warps)
      if (w.state == State::at_wgmma_wait) w.state = State::running, w.wgmma_groups.clear();
    return true;
  }
  if (done) report(b.warps[0], first, "a barrier after some warps ended", done, 0);
  combine(b);
  for (Warp& w : b.warps)
    if (w.state == State::at_barrier) w.state = State::running;
  b.epoch++, b.launch->barriers++;
  return true;
}

}  // namespace

void run_block(Block& b, int order) {
  Launch& launch = *b.launch;
  std::fill(b.shared.begin(), b.shared.end(), launch.zeros ? 0 : kPoison);
  std::fill(b.shadow.begin(), b.shadow.end(), SharedByte());
  b.epoch = 1;
  for (size_t n = 0; n < b.warps.size(); n++) start(b.warps[n], b, static_cast<int>(n));
  std::vector<Warp*> ready;
  while (!launch.stopped) {
    ready.clear();
    for (Warp& w : b.warps)
      if (w.state == State::running) ready.push_back(&w);
    if (ready.empty()) {
      if (!open_barrier(b)) break;
    } else if (order == 2) {
      Warp& w = *ready[launch.random() % ready.size()];
      run_warp(w, 1 + launch.random() % 40);
    } else {
      run_warp(order ? *ready.back() : *ready.front(), LLONG_MAX);
    }
  }
}

}  // namespace ptx
