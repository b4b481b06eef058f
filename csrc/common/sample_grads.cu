// The kernels of sample_grads.h, and their launches.
#include "common/one_pass_launch.h"
#include "common/sample_grads_block.h"
#include "common/sample_grads_plan.h"

namespace adamix {

template <typename T, int Steps>
__global__ void __launch_bounds__(kSampleThreads, 1) sample_grads_kernel(SampleGrads<T> p) {
  if constexpr (kHasFragments<T>) {
    SharedMemory shared;
    SampleMemory<T, Steps> memory(shared, p.samples);
    SampleBlock<T, Steps> block(p, memory);
    allow_next_launch();
    block.walk();
  }
}

template <typename T>
__global__ void __launch_bounds__(kPassSumThreads) sample_sum_kernel(PassSum<T> p) {
  pass_sum<1>(p);
}

#define ADAMIX_INSTANTIATE(T)                                         \
  template __global__ void sample_grads_kernel<T, 1>(SampleGrads<T>); \
  template __global__ void sample_grads_kernel<T, 2>(SampleGrads<T>); \
  template __global__ void sample_grads_kernel<T, 3>(SampleGrads<T>); \
  template __global__ void sample_grads_kernel<T, 4>(SampleGrads<T>); \
  template __global__ void sample_sum_kernel<T>(PassSum<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
namespace {

constexpr int kExpertsSorted = 64;  // at most, of a side

template <typename T>
size_t sample_bytes(int steps, int samples) {
  switch (steps) {
    case 1:
      return shared_bytes<SampleMemory<T, 1>>(samples);
    case 2:
      return shared_bytes<SampleMemory<T, 2>>(samples);
    case 3:
      return shared_bytes<SampleMemory<T, 3>>(samples);
    default:
      return shared_bytes<SampleMemory<T, 4>>(samples);
  }
}

// Whether a side's tensors are such as a block takes.
template <typename T>
bool serves(const GradSide<T>& side, int64_t tokens) {
  auto of_samples = [&](const Routing& routing) {
    return routing.ids == nullptr || static_cast<int64_t>(routing.rows_per_id.by) == tokens;
  };
  return side.groups == 1 && side.cols > 0 && side.cols % kSampleCols == 0 && side.ranks > 0 && side.ranks <= 64 &&
         side.wide.aligned && side.narrow_aligned && side.experts <= kExpertsSorted && of_samples(side.routing) &&
         of_samples(side.other);
}

}  // namespace

template <typename T>
SamplePlan sample_plan(const GradSide<T>& down, const GradSide<T>& up, int64_t batch, int64_t tokens,
                       const Device& device) {
  const GradSide<T>& any = down.experts > 0 ? down : up;
  bool both = down.experts > 0 && up.experts > 0;
  if (device.capability < 80 || any.experts == 0 || !serves(any, tokens) || batch == 0 || batch > kSamplesSorted ||
      tokens < kSampleRows / 2 || (both && (!serves(up, tokens) || up.cols != down.cols || up.ranks != down.ranks))) {
    return {};
  }
  SamplePlan plan{};
  plan.steps = ceil_div(any.ranks, kFragmentRanks);
  plan.tiles_a_sample = ceil_div(static_cast<int>(tokens), kSampleRows);
  plan.down_jobs = down.experts > 0 ? any.cols / kSampleCols : 0;
  plan.up_jobs = up.experts > 0 ? any.cols / kSampleCols : 0;
  int64_t tiles = batch * plan.tiles_a_sample, shares = device.multiprocessors / (plan.down_jobs + plan.up_jobs);
  if (shares > tiles / 4) shares = tiles / 4;  // a plane costs what a few tiles do
  if (shares < 1) shares = 1;
  int64_t a_share = (tiles + shares - 1) / shares;
  int64_t samples = (a_share + plan.tiles_a_sample - 2) / plan.tiles_a_sample + 1;
  int64_t experts = down.experts > up.experts ? down.experts : up.experts;
  plan.shares = static_cast<int>(shares);
  plan.slots = static_cast<int>(samples < experts ? samples : experts);
  bool biases = any.bias_of != BiasOf::kNone;
  plan.planes_size = static_cast<int64_t>(any.ranks) * any.cols + (biases ? any.cols : 0);
  bool large = plan.planes() > 2 * batch * tokens * any.cols;
  bool fits = sample_bytes<T>(plan.steps, static_cast<int>(batch)) <= static_cast<size_t>(device.shared_bytes) &&
              pass_sum_bytes(plan.shares, plan.slots) <= static_cast<size_t>(device.shared_bytes);
  return large || !fits ? SamplePlan{} : plan;
}

template <typename T>
void launch_sample_grads(const SamplePlan& plan, const GradSide<T>& down, const GradSide<T>& up, const Dropout& dropout,
                         float down_scale, float up_scale, int64_t batch, int64_t tokens, float* planes,
                         const Device& device) {
  SampleGrads<T> params{};
  params.down = down, params.up = up;
  params.dropout = dropout;
  params.planes = planes;
  params.experts = reinterpret_cast<int*>(planes + plan.planes());
  params.planes_size = plan.planes_size;
  params.slots = plan.slots;
  params.samples = static_cast<int>(batch);
  params.tokens = static_cast<int>(tokens);
  params.tiles_a_sample = plan.tiles_a_sample;
  params.down_jobs = plan.down_jobs;
  const GradSide<T>& any = down.experts > 0 ? down : up;
  params.cols = any.cols, params.ranks = any.ranks;
  Shape shape{dim3(plan.down_jobs + plan.up_jobs, plan.shares), kSampleThreads,
              sample_bytes<T>(plan.steps, params.samples)};
  auto run = [&](auto kernel) { launch("sample_grads", kernel, shape, device, params); };
  switch (plan.steps) {
    case 1:
      run(sample_grads_kernel<T, 1>);
      break;
    case 2:
      run(sample_grads_kernel<T, 2>);
      break;
    case 3:
      run(sample_grads_kernel<T, 3>);
      break;
    default:
      run(sample_grads_kernel<T, 4>);
  }
  PassSum<T> sum{};
  sum.planes = planes;
  sum.experts = params.experts;
  sum.planes_size = plan.planes_size;
  sum.blocks = plan.shares;
  sum.slots = plan.slots;
  sum.hidden = any.cols;
  sum.rank = any.ranks;
  sum.down_weight = down.weight.out, sum.down_bias = down.bias.out;
  sum.up_weight = up.weight.out, sum.up_bias = up.bias.out;
  sum.down_scale = down_scale, sum.up_scale = up_scale;
  launch_pass_sum<1>("sample_sum", sample_sum_kernel<T>, sum, down.experts, up.experts, device);
}

#define ADAMIX_INSTANTIATE(T)                                                                                         \
  template SamplePlan sample_plan(const GradSide<T>&, const GradSide<T>&, int64_t, int64_t, const Device&);           \
  template void launch_sample_grads(const SamplePlan&, const GradSide<T>&, const GradSide<T>&, const Dropout&, float, \
                                    float, int64_t, int64_t, float*, const Device&);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE
#endif

}  // namespace adamix
