#include "infer/quant/product_hessians.h"

#include <vector>

#include "src/autograd/context.h"

namespace fathom {

namespace {

// What fp32 sums by itself: then double goes on. That is 64 batches of calibration_batches(), each added to
// the sum as a whole, so the sum is rounded 64 times; and bringing it to the host and adding it there costs
// as much as some 10^5 tokens.
constexpr std::int64_t kTokensOnDevice = 1 << 18;

}  // namespace

ProductObserver ProductHessians::observer() {
  const auto reads =
      device_ != nullptr ? ProductObserver::Reads::DeviceWherePossible : ProductObserver::Reads::Host;
  const auto see = [this](const ProductInput& input) {
    if (input.on_device) {
      add_on_device(input);
      return;
    }
    const auto at = hessians_.try_emplace({input.parameter, input.expert}, input.columns).first;
    at->second.add(input.x, input.gates);
  };
  return {see, reads};
}

// x^T x is the gradient of a matrix whose outputs' gradient is x.
void ProductHessians::add_on_device(const ProductInput& input) {
  Context& c = *device_;
  const std::int64_t n = input.columns, rows = input.on_device.size / n;
  DeviceSum& at = sums_[{input.parameter, input.expert}];
  if (at.tokens == 0) at.sum = c.zeros({n, n}, c.stat_dtype());
  c.backend().linear_backward_weight_accumulate(at.sum, input.on_device, input.on_device,
                                                {.rows = rows, .in = n, .out = n});
  at.tokens += rows;
  if (at.tokens >= kTokensOnDevice) collect();
}

void ProductHessians::collect() {
  for (auto& [key, of] : sums_) {
    const std::int64_t n = of.sum.dim(0);
    Hessian& all = hessians_.try_emplace(key, n).first->second;
    if (of.sum.dtype() == DType::F64) {
      all.merge(Hessian(n, to_doubles(device_->backend(), of.sum), of.tokens));
    } else {
      all.add_sum(to_floats(device_->backend(), of.sum), of.tokens);
    }
  }
  sums_.clear();
}

const Hessian* ProductHessians::find(const std::string& parameter, std::int64_t expert) const {
  const auto found = hessians_.find({parameter, expert});
  return found == hessians_.end() ? nullptr : &found->second;
}

std::int64_t ProductHessians::tokens(const std::string& parameter, std::int64_t expert) const {
  const Hessian* h = find(parameter, expert);
  return h != nullptr ? h->tokens() : 0;
}

}  // namespace fathom
