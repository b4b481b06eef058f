// Merging's entries from the dispatcher: checks, allocation, launch.
#include "merge/merge.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <type_traits>

#include "common/scalar_checks.h"
#include "registration.h"

namespace adamix {
namespace {

// A bank with its scores, checked.
struct Bank {
  int experts, size;
  Kind scored;
};

// What a message calls a tensor: its name, or that of a list and its place there.
struct Name {
  const char* list;
  int64_t place = -1;
  std::string text() const { return place < 0 ? list : list + ("[" + std::to_string(place) + "]"); }
};

// check(the tensor's name) in words where `fits` does not hold: names are put together for a message alone.
template <typename Check>
void unless(bool fits, const Name& name, Check check) {
  if (!fits) check(name.text().c_str());
}

Bank check_bank(const Name& name, const Tensor& bank, const Name& scores_name, const OptionalTensor& scores) {
  ScalarType dtype = bank.scalar_type();
  bool served = dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  unless(served, name, [&](const char* text) { check_dtype(text, bank); });
  int64_t experts = bank.dim() == 0 ? 0 : bank.size(0);
  unless(experts > 0, name,
         [&](const char* text) { fail(text, shape_text(bank), "[M, ...] with at least one expert"); });
  unless(experts <= std::numeric_limits<unsigned short>::max(), name,
         [&](const char* text) { fail(text, shape_text(bank), "fewer than 65536 experts"); });
  int64_t size = bank.numel() / experts;
  unless(size <= std::numeric_limits<int>::max(), name, [&](const char* text) { check_int(text, size); });
  Bank checked{static_cast<int>(experts), static_cast<int>(size), Kind::kNone};
  if (scores.has_value()) {
    bool fits = is_beside(*scores, bank) && scores->dim() == 1 && scores->size(0) == experts;
    unless(fits, scores_name, [&](const char* text) {
      check_same_device(text, *scores, name.text().c_str(), bank);
      check_sizes(text, *scores, "[M]", {experts});
    });
    checked.scored =
        scores->scalar_type() == ScalarType::Float ? Kind::kFloat : check_kind(scores_name.text().c_str(), *scores);
  }
  return checked;
}

std::vector<int64_t> merged_sizes(const Tensor& bank) {
  auto sizes = bank.sizes();
  return std::vector<int64_t>(sizes.begin() + 1, sizes.end());
}

void* address(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

int blocks_of(int64_t size, int chunk) { return static_cast<int>((size + chunk - 1) / chunk); }

// Banks of one dtype, gathered into launches of as many as the parameters hold; flush() makes the last one.
template <typename T>
class BanksLaunch {
 public:
  explicit BanksLaunch(const Device& device) : device_(device) {}
  BanksLaunch(const BanksLaunch&) = delete;

  void add(const Tensor& bank, const OptionalTensor& scores, const Bank& checked, T* out) {
    add(data<const T>(kept(bank)), scores.has_value() ? kept(*scores).data_ptr() : nullptr, checked, out);
  }
  // Of contiguous memory.
  void add(const T* bank, const void* scores, const Bank& checked, T* out) {
    if (checked.size == 0) return;
    int more = blocks_of(checked.size, kMergeChunk<T>), at = params_.banks;
    if (at == kMergeBanks || blocks_ + more > std::numeric_limits<int>::max()) flush(), at = 0;
    params_.bank[at] = bank;
    params_.out[at] = out;
    params_.scores[at] = scores;
    params_.size[at] = checked.size;
    params_.first_block[at] = static_cast<int>(blocks_);
    params_.experts[at] = static_cast<unsigned short>(checked.experts);
    params_.scored[at] = checked.scored;
    params_.aligned[at] = is_aligned(bank, {checked.size}, sizeof(T)) && is_aligned(out, {}, 1);
    params_.most_experts = std::max(params_.most_experts, checked.experts);
    wide_ = wide_ || checked.scored == Kind::kDouble;
    params_.banks = at + 1;
    blocks_ += more;
  }
  void flush() {
    launch_merge_banks(params_, static_cast<int>(blocks_), wide_, device_);
    params_ = {}, blocks_ = 0;
  }

 private:
  // `tensor` when contiguous, else a copy that lives as long as this.
  const Tensor& kept(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    copies_.push_back(as_contiguous(tensor));
    return copies_.back();
  }

  Device device_;
  MergeBanks<T> params_{};
  int64_t blocks_ = 0;
  bool wide_ = false;
  std::deque<Tensor> copies_;
};

}  // namespace

Tensor merge_banks_forward(std::vector<Tensor> banks, std::vector<OptionalTensor> scores, std::vector<int64_t> offsets,
                           int64_t elements) {
  size_t count = banks.size();
  if (count == 0) fail("banks", "none of them", "at least one");
  // An empty list stands for none of them all.
  if (!scores.empty() && scores.size() != count) {
    fail("scores", std::to_string(scores.size()) + " of them", "none, or as many as banks: " + std::to_string(count));
  }
  scores.resize(count);
  if (offsets.size() != count) {
    fail("offsets", std::to_string(offsets.size()) + " of them", "as many as banks: " + std::to_string(count));
  }
  std::vector<Bank> checked(count);
  ScalarType dtype = banks[0].scalar_type();
  for (size_t n = 0; n < count; ++n) {
    int64_t place = static_cast<int64_t>(n);
    checked[n] = check_bank({"banks", place}, banks[n], {"scores", place}, scores[n]);
    bool alike = banks[n].scalar_type() == dtype && is_beside(banks[n], banks[0]);
    unless(alike, {"banks", place}, [&](const char* text) { check_like(text, banks[n], "banks[0]", banks[0]); });
    if (offsets[n] < 0 || offsets[n] > elements - checked[n].size) {
      fail("offsets", std::to_string(offsets[n]), "0 <= offset, offset + size <= " + std::to_string(elements));
    }
  }
  Device device = check_device("banks[0]", banks[0]);
  Tensor out = allocate(banks[0], {elements});
  DeviceScope scope(device);
  dispatch(check_dtype("banks[0]", banks[0]), [&](auto type) {
    using T = typename decltype(type)::type;
    BanksLaunch<T> launch(device);
    for (size_t n = 0; n < count; ++n) launch.add(banks[n], scores[n], checked[n], data<T>(out) + offsets[n]);
    launch.flush();
  });
  return out;
}

void merge_banks_into(const Tensor& out, const MergedBank* banks, size_t count) {
  int64_t elements = out.numel();
  for (size_t n = 0; n < count; ++n) {
    const MergedBank& bank = banks[n];
    bool fits = bank.experts > 0 && bank.experts <= std::numeric_limits<unsigned short>::max() && bank.size >= 0 &&
                bank.size <= std::numeric_limits<int>::max() && bank.offset >= 0 && bank.offset <= elements - bank.size;
    unless(fits, {"banks", static_cast<int64_t>(n)}, [&](const char* text) {
      fail(text, std::to_string(bank.experts) + " experts of " + std::to_string(bank.size) + " elements",
           "1 to 65535 that 32 bits count, and results within " + std::to_string(elements));
    });
  }
  Device device = check_device("out", out);
  DeviceScope scope(device);
  dispatch(check_dtype("out", out), [&](auto type) {
    using T = typename decltype(type)::type;
    BanksLaunch<T> launch(device);
    for (size_t n = 0; n < count; ++n) {
      const MergedBank& bank = banks[n];
      Bank checked{static_cast<int>(bank.experts), static_cast<int>(bank.size),
                   bank.scores == nullptr ? Kind::kNone : Kind::kFloat};
      launch.add(static_cast<const T*>(bank.data), bank.scores, checked, data<T>(out) + bank.offset);
    }
    launch.flush();
  });
}

Tensor merge_experts_forward(Tensor bank, OptionalTensor scores) {
  Bank checked = check_bank({"bank"}, bank, {"scores"}, scores);
  Device device = check_device("bank", bank);
  Tensor out = allocate(bank, merged_sizes(bank));
  DeviceScope scope(device);
  dispatch(check_dtype("bank", bank), [&](auto type) {
    using T = typename decltype(type)::type;
    BanksLaunch<T> launch(device);
    launch.add(bank, scores, checked, data<T>(out));
    launch.flush();
  });
  return out;
}

std::tuple<Tensor, Tensor> merge_experts_backward(Tensor grad_out, Tensor bank, OptionalTensor scores, bool need_bank,
                                                  bool need_scores) {
  Bank checked = check_bank({"bank"}, bank, {"scores"}, scores);
  check_like("grad_out", grad_out, "bank", bank);
  check_sizes("grad_out", grad_out, "bank's shape without the first axis", merged_sizes(bank));
  if (need_scores && !scores.has_value()) fail("scores", "none", "scores, as their gradient is wanted");
  Device device = check_device("bank", bank);

  bool wide = checked.scored == Kind::kDouble;
  auto sizes = bank.sizes();
  std::vector<int64_t> none{0}, whole(sizes.begin(), sizes.end());
  Tensor bank_grad = allocate(bank, need_bank ? whole : none);
  Tensor scores_grad = need_scores ? allocate(*scores, {checked.experts}) : allocate(bank, none);
  if (!need_bank && !need_scores) return {bank_grad, scores_grad};
  bank = as_contiguous(bank), grad_out = as_contiguous(grad_out);
  if (scores.has_value()) scores = as_contiguous(*scores);
  DeviceScope scope(device);
  dispatch(check_dtype("bank", bank), [&](auto type) {
    using T = typename decltype(type)::type;
    int blocks = std::min(blocks_of(checked.size, kMergeChunk<T>), kMergeGradBlocks);
    OptionalTensor plane;
    if (need_scores) plane = allocate(bank, {checked.experts, blocks}, wide ? ScalarType::Double : ScalarType::Float);
    MergeGrad<T> params{};
    params.grad = data<const T>(grad_out);
    params.bank = data<const T>(bank);
    params.scores = address(scores);
    params.bank_grad = need_bank ? data<T>(bank_grad) : nullptr;
    params.plane = address(plane);
    params.size = checked.size;
    params.experts = checked.experts;
    params.scored = checked.scored;
    params.aligned = is_aligned(params.bank, {checked.size}, sizeof(T)) && is_aligned(params.grad, {}, 1) &&
                     is_aligned(params.bank_grad, {}, 1);
    launch_merge_grad(params, blocks, wide, device);
    if (need_scores) {
      launch_merge_scores_grad(
          {params.plane, params.scores, scores_grad.data_ptr(), blocks, checked.experts, checked.scored}, wide, device);
    }
  });
  return {bank_grad, scores_grad};
}

}  // namespace adamix
