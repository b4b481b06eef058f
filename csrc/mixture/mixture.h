// LoRA with gates, whose router's logits are columns of the first product:
// logits = x W^T; gates = softmax(logits), or that of the top_k largest; out = base + the gated experts' sum (gated.h).
#pragma once

#include "gated/gated.h"

namespace adamix {

constexpr int kMixtureMostExperts = 16;  // two eights of columns

template <typename T>
struct MixtureForward : GatedForward<T> {  // without gates.values, down.ids and up.ids: made here
  const void* router;                      // [routed, K], in rows of 16-byte pieces
  float* gate_values;                      // [N, gates.slots]
  int64_t* ids;                            // the same, of the slots' experts; null where every row has all
  float* logits;                           // [N, routed]
  int routed;                              // experts of the router
  bool wide;                               // the router is float32, and rounded to T
};

#if defined(ADAMIX_LAUNCHERS)
// Launches nothing and returns false where rows are no 16-byte pieces, the experts are too many for a tile, or the GPU
// has no such products in registers.
template <typename T>
bool launch_mixture_forward_mma(const MixtureForward<T>& params, const Device& device);
#endif

}  // namespace adamix
