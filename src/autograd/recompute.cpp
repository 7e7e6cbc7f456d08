#include "src/autograd/recompute.h"

namespace fathom {

namespace {

void run_backward(Context& c, Tape& outer, const BlockFunction& f, const std::vector<Tensor>& inputs,
                  std::size_t outputs) {
  std::vector<Tensor> gradients;
  for (std::size_t i = 0; i < outputs; ++i) gradients.push_back(outer.gradient(i));

  std::vector<Tensor> leaves;
  for (const Tensor& x : inputs) {
    Tensor leaf = x.defined() ? x.detach() : Tensor();
    if (leaf.defined()) leaf.set_requires_grad(x.requires_grad());
    leaves.push_back(std::move(leaf));
  }
  Tape inner(c);
  std::vector<Tensor> again;
  {
    const Recording recording(c, inner);
    again = f(c, leaves);
  }
  for (std::size_t i = 0; i < outputs; ++i) inner.seed(again[i], std::move(gradients[i]));
  again.clear();
  inner.backward();
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (leaves[i].defined()) outer.give(inputs[i], inner.collected(leaves[i]));
  }
}

}  // namespace

std::vector<Tensor> recompute(Context& c, const BlockFunction& f, const std::vector<Tensor>& inputs) {
  Tape* tape = c.tape();
  if (tape == nullptr) return f(c, inputs);
  std::vector<Tensor> outputs;
  {
    const NoGrad no_grad(c);
    outputs = f(c, inputs);
  }
  const auto backward = [context = &c, f, inputs, n = outputs.size()](Tape& t) {
    run_backward(*context, t, f, inputs, n);
  };
  tape->record("recompute", outputs, backward);
  return outputs;
}

}  // namespace fathom
