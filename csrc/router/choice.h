// Which experts a router takes: those of the largest logits. A NaN counts as infinity, and of equal ones the first
// wins.
#pragma once

#include "router/router.h"

namespace adamix {

ADAMIX_DEVICE float infinity() { return float_of_bits(0x7f800000u); }

// An expert and what it is chosen by.
struct Ranked {
  float rank;
  int id;
};
struct Larger {
  ADAMIX_DEVICE Ranked operator()(Ranked a, Ranked b) const {
    return a.rank > b.rank || (a.rank == b.rank && a.id < b.id) ? a : b;
  }
};

}  // namespace adamix
