// Which blocks of a backward in one pass (one_pass.h) join their sums.
#pragma once

#include "common/one_pass_plan.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {

constexpr uint32_t kJoinedExperts = 8;  // of a side, at most, where each block may hold others

// Blocks of a cluster join what they hold of the same expert, and go through its experts one after another: that gains
// nothing where each has whole samples, of many experts. Then every block writes its own sums.
inline void limit_cluster(PassPlan& plan, const Routing& down, const Routing& up) {
  auto many = [](const Routing& routing) { return routing.ids != nullptr && routing.experts > kJoinedExperts; };
  if (plan.tiles_a_block >= plan.tiles_a_sample && (many(down) || many(up))) plan.cluster = 1;
}

}  // namespace adamix
#endif
