// Whether weight gradients go as sample_grads.h has them, and how their rows are shared out.
#pragma once

#include "common/dropout.h"
#include "common/fragment_shape.h"
#include "common/grad_side.h"
#include "common/launch.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {

// shares 0: not so.
struct SamplePlan {
  int shares, steps, slots;
  int down_jobs, up_jobs;  // blocks of a share
  int tiles_a_sample;
  int64_t planes_size;
  // Floats of all planes, and of the numbers of their experts behind them.
  int64_t planes() const { return int64_t{2} * shares * slots * planes_size; }
  int64_t floats() const { return planes() + int64_t{2} * shares * slots; }
};

// Every sample has one expert a side: ids of samples, or none. Samples are of a tile's rows, or half of them at least.
template <typename T>
SamplePlan sample_plan(const GradSide<T>& down, const GradSide<T>& up, int64_t batch, int64_t tokens,
                       const Device& device);

// scale: of the sides' sums. planes: plan.floats() of them.
template <typename T>
void launch_sample_grads(const SamplePlan& plan, const GradSide<T>& down, const GradSide<T>& up, const Dropout& dropout,
                         float down_scale, float up_scale, int64_t batch, int64_t tokens, float* planes,
                         const Device& device);

}  // namespace adamix
#endif
