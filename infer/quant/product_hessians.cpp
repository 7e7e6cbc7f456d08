#include "infer/quant/product_hessians.h"

namespace fathom {

ProductObserver ProductHessians::observer() {
  return [this](const ProductInput& input) {
    const auto at = hessians_.try_emplace({input.parameter, input.expert}, input.columns).first;
    at->second.add(input.x, input.gates);
  };
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
