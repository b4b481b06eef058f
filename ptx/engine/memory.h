// Access to global and shared memory: every byte checked before it is read or written.
#pragma once

#include "engine.h"

namespace ptx {

Range* find_range(Launch& launch, u64 address, u64 bytes);

// Bounds, alignment and races of one lane's access; false: it must not happen. value: what is to be written, which is
// no race where it is there already. cached: a load looks in L1 first.
bool check_global(Warp& w, const Instruction& i, u64 address, int bytes, int lane, bool write,
                  const u8* value = nullptr, bool cached = true);

// The same of shared memory. async: a cp.async that will write.
bool check_shared(Warp& w, const Instruction& i, u32 address, int bytes, int lane, bool write,
                  const u8* value = nullptr, bool async = false);

// Whether each of these bytes of shared memory was written, by a value that is defined.
bool is_defined(const Block& block, u32 address, int bytes);
void set_defined(Block& block, u32 address, int bytes, bool defined);

// Counts the sectors and the bank waves of one instruction.
void count_global(Instruction& i, const u64* addresses, int bytes, Mask m);
void count_shared(Instruction& i, const u32* addresses, int bytes, Mask m);
void count_rows(Instruction& i, const u32* addresses, int first);  // eight rows of 16 bytes, of ldmatrix and stmatrix

// cp.async of all groups but the newest `keep` land.
void land_copies(Warp& w, size_t keep);

// Runs what a wgmma.wait_group waits for; false: not all warps of the group have issued it.
bool finish_wgmmas(Warp& w, const Instruction& i);

}  // namespace ptx
