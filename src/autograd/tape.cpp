#include "src/autograd/tape.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

bool wants_record(const Context& c, std::initializer_list<Tensor> inputs) {
  return c.tape() != nullptr &&
         std::any_of(inputs.begin(), inputs.end(), [](const Tensor& t) { return t.requires_grad(); });
}

void Tape::record(const char* op, const std::vector<Tensor>& outputs, Backward backward) {
  Node node{op, context_.layer(), context_.backend().flop_log.item(), {}, std::move(backward), false};
  for (Tensor t : outputs) {
    t.set_requires_grad(true);
    node.outputs.push_back(t.id());
  }
  nodes_.push_back(std::move(node));
}

void Tape::record_loss(const char* op, Backward backward) {
  nodes_.push_back({op, context_.layer(), context_.backend().flop_log.item(), {}, std::move(backward), true});
}

void Tape::backward(const LayerDone& done) {
  const NoGrad no_grad(context_);
  std::string at = nodes_.empty() ? "" : nodes_.back().layer;
  while (!nodes_.empty()) {
    // Moved out, so that what the closure saved is released as soon as it has run.
    Node node = std::move(nodes_.back());
    nodes_.pop_back();
    if (done && node.layer != at) done(std::exchange(at, node.layer));
    const bool used =
        node.is_loss || std::any_of(node.outputs.begin(), node.outputs.end(),
                                    [this](std::uint64_t id) { return gradients_.contains(id); });
    if (!used) continue;
    const LayerScope layer(context_, node.layer);
    const FlopItem item(context_, node.flop_item);
    running_ = &node;
    node.backward(*this);
    for (const Tensor& sum : added_into_) context_.check(node.op, " backward", sum);
    added_into_.clear();
    running_ = nullptr;
    for (std::uint64_t id : node.outputs) gradients_.erase(id);
  }
  if (done) done(at);
}

void Tape::clear() {
  nodes_.clear();
  gradients_.clear();
}

Tensor Tape::taken_out(std::uint64_t id) {
  const auto found = gradients_.find(id);
  if (found == gradients_.end()) return {};
  Tensor g = std::move(found->second);
  gradients_.erase(found);
  return g;
}

Tensor Tape::gradient(std::size_t i) { return taken_out(running_->outputs.at(i)); }

Tensor Tape::take(const Tensor& x) { return x.bound_gradient().defined() ? Tensor() : taken_out(x.id()); }

Tensor Tape::gradient_or_zeros(std::size_t i, const Shape& shape, DType dtype) {
  Tensor g = gradient(i);
  return g.defined() ? g : context_.zeros(shape, dtype);
}

void Tape::give(const Tensor& x, Tensor gradient) {
  if (!x.requires_grad() || !gradient.defined()) return;
  if (gradient.shape() != x.shape()) {
    throw InternalError(fmt::format("[{} backward] gradient of shape {} for a tensor of shape {}",
                                    running_ ? running_->op : "seed", gradient.shape().str(),
                                    x.shape().str()));
  }
  if (running_) context_.check(running_->op, " backward", gradient);
  if (x.bound_gradient().defined()) {
    context_.backend().accumulate(sum_into(x), gradient);
    return;
  }
  Tensor& sum = gradients_[x.id()];
  if (!sum.defined()) {
    sum = std::move(gradient);
  } else if (sum.owners() == 1) {
    context_.backend().accumulate(sum, gradient);
  } else {  // somebody else holds this storage: an op that gave one gradient to two inputs
    Tensor fresh = context_.empty(sum.shape(), sum.dtype());
    context_.backend().add(fresh, sum, gradient);
    sum = std::move(fresh);
  }
}

Tensor Tape::sum_into(const Tensor& x) {
  const Sum sum = begin_or_sum(x);
  if (sum.empty) context_.backend().fill(sum.tensor, 0.0);
  return sum.tensor;
}

Tape::Sum Tape::begin_or_sum(const Tensor& x) {
  const Tensor sum = x.bound_gradient().defined() ? x.bound_gradient() : own_sum(x);
  const bool empty = sum.begins_anew();
  if (empty) sum.set_begins_anew(false);
  if (running_ && context_.traces_nonfinite()) added_into_.push_back(sum);
  return {sum, empty};
}

Tensor Tape::own_sum(const Tensor& x) {
  Tensor& sum = gradients_[x.id()];
  if (!sum.defined()) {
    sum = context_.zeros(x.shape(), x.dtype());
  } else if (sum.owners() > 1) {
    Tensor fresh = context_.empty(sum.shape(), sum.dtype());
    context_.backend().copy(fresh, sum);
    sum = std::move(fresh);
  }
  return sum;
}

Tensor Tape::collected(const Tensor& leaf) {
  const auto found = gradients_.find(leaf.id());
  return found == gradients_.end() ? Tensor() : found->second;
}

}  // namespace fathom
