// What stands between the dispatcher and the launchers: checks that name the argument, and the current device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "common/launch.h"
#include "common/rows.h"
#include "entries.h"

namespace adamix {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Throws "<name>: got <got>, expected <expected>".
[[noreturn]] void fail(const char* name, const std::string& got, const std::string& expected);

// Throws "<name>: <what the CUDA runtime says>" for an error, which is then no longer the thread's last one.
void check_cuda(const char* name, cudaError_t error);

// The element type of a floating tensor the kernels serve.
DType check_dtype(const char* name, const Tensor& tensor);

// Not Tensor::device(), which looks a device up by its shim's number.
inline bool is_beside(const Tensor& tensor, const Tensor& like) {
  int32_t device = 0, wanted = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &wanted));
  return device == wanted && tensor.get_device_index() == like.get_device_index();
}

// `tensor` has the dtype and the device of `like`.
void check_like(const char* name, const Tensor& tensor, const char* like_name, const Tensor& like);

// `tensor` has these sizes; -1 stands for any. `layout`, e.g. "[B, S, H]", is what the message says.
void check_sizes(const char* name, const Tensor& tensor, const char* layout, Sizes sizes);

// Sizes that the kernels count in 32 bits.
int check_int(const char* name, int64_t value);

// A bank of weights or biases: `tensor` itself when contiguous, else a contiguous copy.
Tensor as_contiguous(const Tensor& tensor);

// [B, S, C] with a contiguous last axis: `tensor` itself when it is, else a contiguous copy.
Tensor with_contiguous_rows(const Tensor& tensor);

// An index that serves `experts` experts of [batch, tokens] rows: [B], [B, S], or none for a bank of one. `kept`
// receives what must live until the launch.
Routing check_routing(const char* name, const OptionalTensor& index, int64_t batch, int64_t tokens, int64_t experts,
                      const Tensor& like, std::vector<Tensor>& kept);

// The device `tensor` is on, with its current stream; throws when the kernels cannot run there. Check all other
// arguments first: a CPU tensor fails here.
Device check_device(const char* name, const Tensor& tensor);

// Makes a device current for the scope, as launches need.
class DeviceScope {
 public:
  explicit DeviceScope(const Device& device) : DeviceScope(device.index) {}
  explicit DeviceScope(int index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_;
};

std::string shape_text(const Tensor& tensor);

// New memory on like's device, in like's dtype if no other is named.
Tensor allocate(const Tensor& like, Sizes sizes, std::optional<ScalarType> dtype = std::nullopt);

// Where `allocate` takes its memory from on this thread, for the scope.
class MemoryScope {
 public:
  explicit MemoryScope(Memory memory);
  ~MemoryScope();
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;

 private:
  Memory previous_;
};

inline bool is_aligned(const void* pointer, std::initializer_list<int64_t> strides, size_t element) {
  bool aligned = reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  for (int64_t stride : strides) aligned = aligned && stride * static_cast<int64_t>(element) % 16 == 0;
  return aligned;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

// A [B, S, C] tensor with contiguous rows as the kernels see it; none: data is null.
template <typename T>
Rows<T> rows_of(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {nullptr, 0, 0, divisor(1), false};
  int64_t batch = tensor->stride(0), token = tensor->stride(1);
  return {data<T>(*tensor), batch, token, divisor(static_cast<int>(tensor->size(1) > 0 ? tensor->size(1) : 1)),
          is_aligned(tensor->data_ptr(), {batch, token}, sizeof(T))};
}

}  // namespace adamix
