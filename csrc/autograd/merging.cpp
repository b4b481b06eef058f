#include "autograd/merging.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <exception>
#include <memory>
#include <vector>

#include "autograd/kernels.h"
#include "autograd/memory.h"
#include "autograd/nodes.h"
#include "autograd/served.h"

namespace adamix {
namespace {

constexpr const char* kPlaces = "adamix_kernels.places";

struct Place {
  std::vector<int64_t> sizes;
  int64_t offset, numel;
};

struct Places {
  std::vector<Place> all;
  int64_t elements;
};

const Places& read_places(PyObject* capsule) {
  void* found = PyCapsule_GetPointer(capsule, kPlaces);
  if (found == nullptr) throw python_error();
  return *static_cast<const Places*>(found);
}

// The tensor that Python holds there, exactly that and plain; null for anything else.
const at::Tensor* plain_at(PyObject* list, size_t n) {
  PyObject* found = PyList_GET_ITEM(list, static_cast<Py_ssize_t>(n));
  if (!THPVariable_CheckExact(found)) return nullptr;
  const at::Tensor& t = THPVariable_Unpack(found);
  return t.defined() && is_plain(t) && t.is_contiguous() ? &t : nullptr;
}

// Whether `bank` [experts, ...] is one whose mean lies at `place`.
bool is_bank_of(const at::Tensor& bank, const Place& place) {
  return bank.dim() > 0 && bank.size(0) > 0 && bank.sizes().slice(1) == c10::IntArrayRef(place.sizes);
}

// What the kernels take of the lists; false where they do not take it.
bool read_banks(const Places& places, PyObject* banks, PyObject* scores, std::vector<MergedBank>& made) {
  size_t count = places.all.size();
  if (count == 0 || static_cast<size_t>(PyList_GET_SIZE(banks)) != count ||
      static_cast<size_t>(PyList_GET_SIZE(scores)) != count) {
    return false;
  }
  const at::Tensor* first = plain_at(banks, 0);
  made.reserve(count);
  for (size_t n = 0; n < count; ++n) {
    const at::Tensor* bank = plain_at(banks, n);
    const Place& place = places.all[n];
    if (bank == nullptr || !is_bank_of(*bank, place) || bank->scalar_type() != first->scalar_type() ||
        bank->device() != first->device()) {
      return false;
    }
    int64_t experts = bank->size(0);
    const void* scored = nullptr;
    if (PyList_GET_ITEM(scores, static_cast<Py_ssize_t>(n)) != Py_None) {
      const at::Tensor* score = plain_at(scores, n);
      if (score == nullptr || score->scalar_type() != at::kFloat || score->dim() != 1 || score->size(0) != experts ||
          score->device() != first->device()) {
        return false;
      }
      scored = score->const_data_ptr();
    }
    made.push_back({bank->const_data_ptr(), scored, experts, place.numel, place.offset});
  }
  return true;
}

PyObject* results_in(const at::Tensor& memory, const Places& places) {
  THPObjectPtr list(PyList_New(static_cast<Py_ssize_t>(places.all.size())));
  if (!list) throw python_error();
  for (size_t n = 0; n < places.all.size(); ++n) {
    const Place& place = places.all[n];
    PyObject* made = THPVariable_Wrap(reshaped(memory, place.sizes, place.offset));
    if (made == nullptr) throw python_error();
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(n), made);
  }
  return list.release();
}

}  // namespace

PyObject* places(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto made = std::make_unique<Places>();
  std::vector<int64_t> offsets;
  TORCH_CHECK(count == 3 && PyList_CheckExact(given[0]) && read(given[1], offsets) && read(given[2], made->elements) &&
                  static_cast<size_t>(PyList_GET_SIZE(given[0])) == offsets.size(),
              "places: expected a list of shapes, as many offsets and the number of elements");
  for (size_t n = 0; n < offsets.size(); ++n) {
    PyObject* shape = PySequence_Tuple(PyList_GET_ITEM(given[0], static_cast<Py_ssize_t>(n)));
    if (shape == nullptr) throw python_error();
    THPObjectPtr owner(shape);
    Place place{{}, offsets[n], 1};
    TORCH_CHECK(read(shape, place.sizes), "places: expected shapes of ints");
    for (int64_t size : place.sizes) place.numel *= size;
    TORCH_CHECK(place.offset >= 0 && place.numel <= made->elements - place.offset,
                "places: expected results within the elements");
    made->all.push_back(std::move(place));
  }
  PyObject* capsule = PyCapsule_New(
      made.get(), kPlaces, [](PyObject* held) { delete static_cast<Places*>(PyCapsule_GetPointer(held, kPlaces)); });
  if (capsule != nullptr) made.release();
  return capsule;
  END_HANDLE_TH_ERRORS
}

PyObject* split(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  at::Tensor memory;
  TORCH_CHECK(count == 2, "split: got ", count, " arguments, expected 2");
  const Places& places = read_places(given[0]);
  if (is_watched() || is_switched_off() || !read(given[1], memory) || !memory.defined() || memory.requires_grad() ||
      memory.dim() != 1 || !memory.is_contiguous() || memory.numel() < places.elements) {
    Py_RETURN_NONE;
  }
  return results_in(memory, places);
  END_HANDLE_TH_ERRORS
}

PyObject* merge_banks(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 3 && PyList_CheckExact(given[1]) && PyList_CheckExact(given[2]),
              "merge_banks: expected places, a list of banks and a list of scores");
  const Places& places = read_places(given[0]);
  std::vector<MergedBank> banks;
  if (is_watched() || is_switched_off() || !find_kernels() || !read_banks(places, given[1], given[2], banks)) {
    Py_RETURN_NONE;
  }
  const at::Tensor& like = THPVariable_Unpack(PyList_GET_ITEM(given[1], 0));
  at::Tensor memory = new_memory(like, {places.elements}, like.scalar_type());
  try {
    kernels().merge_banks({handle(memory), banks.data(), banks.size()});
  } catch (const std::exception&) {
    Py_RETURN_NONE;  // before anything was launched: the long way has words for it
  }
  return results_in(memory, places);
  END_HANDLE_TH_ERRORS
}

}  // namespace adamix
