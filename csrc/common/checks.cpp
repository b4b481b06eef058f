#include "common/checks.h"

#include <dlfcn.h>

#include <algorithm>
#include <limits>

#include "common/architectures.h"
#include "common/planes.h"

namespace adamix {
namespace {

thread_local Memory memory_here = nullptr;

std::string list(Sizes values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i ? ", " : "") + (values[i] < 0 ? std::string("any") : std::to_string(values[i]));
  }
  return text + (values.size() == 1 ? ",)" : ")");
}

std::string dtype_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }

// What torch said of the error that its C interface has just returned; before 2.13 it prints that, and keeps nothing.
std::string torchs_words() {
  using Get = const char* (*)();
  static Get get = [] {
    void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Get>(dlsym(library, "torch_exception_get_what_without_backtrace"));
  }();
  return get == nullptr ? "" : get();
}

// For memory that torch refused: in its words, by which its users know that a smaller batch may do.
[[noreturn]] void fail_to_allocate(const std::string& sizes) {
  std::string words = torchs_words();
  if (words.empty()) {
    // A GPU that answers no more refuses everything.
    cudaFuncAttributes attributes{};
    check_cuda("the GPU", cudaFuncGetAttributes(&attributes, any_kernel()));
    words = "CUDA out of memory. Tried to allocate " + sizes;
  }
  throw std::runtime_error(words);
}

#if !defined(ADAMIX_HOST)
// torch's own symbol, looked up at run time: a plain reference would not load beside a torch without CUDA.
void* current_stream(int device) {
  using Get = int (*)(int32_t, void**);
  static Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0) {
    throw std::runtime_error("torch's current CUDA stream is not to be had: is this torch built with CUDA?");
  }
  return stream;
}
#endif

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Of the code that runs there: PTX for sm_80 has no clusters on sm_90 either.
int running_capability(int device) {
  int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
#if defined(ADAMIX_HOST)
  return capability;
#else
  return running_architecture(ADAMIX_ARCHITECTURES, capability);
#endif
}

}  // namespace

void fail(const char* name, const std::string& got, const std::string& expected) {
  throw std::runtime_error(std::string(name) + ": got " + got + ", expected " + expected);
}

void check_cuda(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

std::string shape_text(const Tensor& tensor) { return "shape " + list(tensor.sizes()); }

DType check_dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(name, dtype_text(tensor.scalar_type()), "Float, Half or BFloat16");
  }
}

void check_like(const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  if (tensor.scalar_type() != like.scalar_type()) {
    fail(name, dtype_text(tensor.scalar_type()), dtype_text(like.scalar_type()) + ", as " + like_name);
  }
  if (!is_beside(tensor, like)) fail(name, "another device", std::string("the device of ") + like_name);
}

void check_sizes(const char* name, const Tensor& tensor, const char* layout, Sizes sizes) {
  Sizes given = tensor.sizes();
  bool fits = given.size() == sizes.size();
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] < 0 || given[i] == sizes[i];
  if (!fits) fail(name, shape_text(tensor), std::string(layout) + " = " + list(sizes));
}

int check_int(const char* name, int64_t value) {
  if (value > std::numeric_limits<int>::max()) fail(name, std::to_string(value), "a size below 2^31");
  return static_cast<int>(value);
}

Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::runtime_error&) {
    fail_to_allocate("a copy of " + list(tensor.sizes()));
  }
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.dim() == 3 && (tensor.stride(2) == 1 || tensor.size(2) == 1) ? tensor : as_contiguous(tensor);
}

// Not torch::stable::new_empty, which looks its op up by name and costs four times as much.
Tensor allocate(const Tensor& like, Sizes sizes, std::optional<ScalarType> dtype) {
  int32_t code = 0, device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  if (dtype.has_value()) code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  if (memory_here != nullptr) return Tensor(memory_here(like.get(), sizes.data(), sizes.size(), code));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t n = sizes.size(); n-- > 0; step *= std::max<int64_t>(sizes[n], 1)) strides[n] = step;
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, device,
                               like.get_device(), &made) != TORCH_SUCCESS) {
    fail_to_allocate(list(sizes) + " elements");
  }
  return Tensor(made);
}

MemoryScope::MemoryScope(Memory memory) : previous_(memory_here) { memory_here = memory; }

MemoryScope::~MemoryScope() { memory_here = previous_; }

Routing check_routing(const char* name, const OptionalTensor& index, int64_t batch, int64_t tokens, int64_t experts,
                      const Tensor& like, std::vector<Tensor>& kept) {
  if (!index.has_value()) {
    if (experts != 1) fail(name, "none", "an index, as the bank holds " + std::to_string(experts) + " experts");
    return {nullptr, false, divisor(1), 1};
  }
  bool wide = index->scalar_type() == ScalarType::Long;
  if (!wide && index->scalar_type() != ScalarType::Int) fail(name, dtype_text(index->scalar_type()), "Int or Long");
  if (!is_beside(*index, like)) fail(name, "another device", "the device of x");
  if (index->dim() == 1) {
    check_sizes(name, *index, "[B]", {batch});
  } else {
    check_sizes(name, *index, "[B] or [B, S]", {batch, tokens});
  }
  kept.push_back(as_contiguous(*index));
  int rows_per_id = index->dim() == 1 && tokens > 0 ? check_int("S", tokens) : 1;
  return {kept.back().data_ptr(), wide, divisor(rows_per_id), static_cast<uint32_t>(check_int(name, experts))};
}

Device check_device(const char* name, const Tensor& tensor) {
#if defined(ADAMIX_HOST)
  if (!tensor.is_cpu()) fail(name, "a tensor that is not on the CPU", "a CPU tensor: the device code runs on the CPU");
  int index = host::device_of_environment();
#else
  if (!tensor.is_cuda()) fail(name, "a tensor that is not on a GPU", "a CUDA tensor");
  int index = tensor.get_device();
#endif
  static thread_local Device known{-1, 0, 0, 0, nullptr};
  if (known.index != index) {
    known = {index, attribute(cudaDevAttrMultiProcessorCount, index),
             attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index), running_capability(index), nullptr};
  }
  Device device = known;
#if !defined(ADAMIX_HOST)
  device.stream = current_stream(index);
#endif
  return device;
}

DeviceScope::DeviceScope(int index) : previous_(-1) {
  int current = 0;
  check_cuda("cudaGetDevice", cudaGetDevice(&current));
  if (current == index) return;
  check_cuda("cudaSetDevice", cudaSetDevice(index));
  previous_ = current;
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace adamix
