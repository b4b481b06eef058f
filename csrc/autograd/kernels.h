// The library's kernels, through csrc/entries.h: what a node calls where no plan is asked for.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <memory>

#include "entries.h"

namespace adamix {

// Whether a library is loaded whose entries are those that this module was compiled for; later calls ask no more, once
// it is.
bool find_kernels();

// After find_kernels() said so.
const Entries& kernels();

// What an entry takes `allocate`'s memory from.
TensorHandle memory_for_kernels(TensorHandle like, const int64_t* sizes, size_t dims, int32_t dtype);

// For as long as t is there.
inline TensorHandle handle(const at::Tensor& t) {
  return t.defined() ? reinterpret_cast<TensorHandle>(const_cast<at::Tensor*>(&t)) : nullptr;
}

// An entry's results.
template <typename Call, size_t N>
std::array<at::Tensor, N> run(void (*entry)(const Call&, Memory, TensorHandle (&)[N]), const Call& call) {
  at::AutoDispatchBelowADInplaceOrView below;
  TensorHandle made[N] = {};
  entry(call, memory_for_kernels, made);
  std::array<at::Tensor, N> results;
  for (size_t n = 0; n < N; ++n) {
    std::unique_ptr<at::Tensor> owned(reinterpret_cast<at::Tensor*>(made[n]));
    if (owned) results[n] = std::move(*owned);
  }
  return results;
}

}  // namespace adamix
