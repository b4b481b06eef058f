// The key of a call: everything that its plan depends on.
#include <cstdint>
#include <utility>

#include "autograd/plans.h"
#include "autograd/served.h"

namespace adamix {

Request::Request(PlanKind kind, std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {
  key_.reserve(512);
  key_ += static_cast<char>(kind);
  for (const at::Tensor& t : tensors_) {
    // Every tensor tells its length, so that no two lists of tensors give the same bytes.
    key_ += static_cast<char>(t.defined() ? t.dim() + 1 : 0);
    if (!t.defined()) continue;
    fits_ = fits_ && is_plain(t) && t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    key_ += static_cast<char>(t.scalar_type());
    key_ += static_cast<char>(t.device().type());
    key_ += static_cast<char>(t.device().index());
    put_bytes(t.sizes().data(), t.dim() * sizeof(int64_t));
  }
}

void Request::put(bool flag) { key_ += flag ? "b1" : "b0"; }
void Request::put(int64_t number) { key_ += 'i', put_bytes(&number, sizeof(number)); }
void Request::put(double number) { key_ += 'f', put_bytes(&number, sizeof(number)); }
void Request::put(const std::string& text) {
  put(static_cast<int64_t>(text.size()));
  key_ += text;
}
void Request::put(c10::IntArrayRef numbers) {
  put(static_cast<int64_t>(numbers.size()));
  put_bytes(numbers.data(), numbers.size() * sizeof(int64_t));
}

}  // namespace adamix
