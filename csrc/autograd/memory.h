// New memory, and tensors that lie in another's: without what autograd would note of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_ops.h>

namespace adamix {

// As at::empty for a tensor like `like`, which is asked for its device here, and not by a trip of its own.
inline at::Tensor new_memory(const at::Tensor& like, c10::IntArrayRef sizes, at::ScalarType dtype) {
  c10::DispatchKey key = like.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  return at::_ops::empty_memory_format::redispatch(c10::DispatchKeySet(key), c10::fromIntArrayRefSlow(sizes), dtype,
                                                   std::nullopt, like.device(), std::nullopt, std::nullopt);
}

// A contiguous tensor's memory from element `offset` on in another shape, and nothing of its history.
inline at::Tensor reshaped(const at::Tensor& t, c10::IntArrayRef sizes, int64_t offset = 0) {
  c10::TensorImpl* given = t.unsafeGetTensorImpl();
  if (given->is_python_dispatch()) {
    auto copy = given->shallow_copy_and_detach(c10::VariableVersion(0), true);
    copy->set_storage_offset(t.storage_offset() + offset);
    copy->set_sizes_contiguous(sizes);
    return at::Tensor(std::move(copy));
  }
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(),
                                                       t.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset() + offset);
  made.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return made;
}

}  // namespace adamix
