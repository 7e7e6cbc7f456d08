// The eager tape: ops record a closure that calls the backend's backward; backward() runs them in reverse.
//
// Losses end the tape. An op that makes a loss computes its gradient with the loss's weight already in it, so
// there is no seed to pass: backward() minimises the weighted sum of all losses recorded.
//
// The tape owns accumulation. A tensor used twice gets the sum of what its users give; a parameter's gradient
// is added up in its bound arena over micro-batches, until the arena is zeroed.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/autograd/context.h"

namespace fathom {

/// What a backward closure sees: the gradients of its op's outputs, and where to put those of its inputs.
class Tape {
 public:
  explicit Tape(Context& context) : context_(context) {}
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  using Backward = std::function<void(Tape&)>;

  /// Records an op. The outputs' gradients are wanted; the closure must not capture the outputs unless it
  /// reads them.
  void record(const char* op, const std::vector<Tensor>& outputs, Backward backward);
  /// Records an op that ends in a loss: its closure always runs.
  void record_loss(const char* op, Backward backward);
  /// Runs every closure once, last first, and forgets them. `done` is told of each layer (Context::layer;
  /// empty outside of the blocks) when the last of its closures in a row has run: what they give is given.
  using LayerDone = std::function<void(const std::string& layer)>;
  void backward(const LayerDone& done = {});
  void clear();
  std::size_t size() const { return nodes_.size(); }

  // --- for closures ---
  /// The gradient of output `i` of the op at hand: undefined when nothing used that output. Taken out of the
  /// tape.
  Tensor gradient(std::size_t i = 0);
  /// As gradient(), but zeros of the output's shape when nothing used it.
  Tensor gradient_or_zeros(std::size_t i, const Shape& shape, DType dtype);
  /// Adds `gradient` to what `x` has so far. Does nothing when x wants none.
  void give(const Tensor& x, Tensor gradient);
  /// What x has so far, taken out of the tape: for an op that adds it to what it gives x itself. Undefined
  /// when nothing used x since, or its gradient is bound.
  Tensor take(const Tensor& x);
  /// A tensor of x's shape to add into: a parameter's arena, or x's sum so far (zeros at first).
  Tensor sum_into(const Tensor& x);
  /// For an op that can overwrite as well as add: a tensor of x's shape, and whether nothing is in it yet.
  struct Sum {
    Tensor tensor;
    bool empty = false;
  };
  Sum begin_or_sum(const Tensor& x);

  // --- for recomputation (recompute.h) ---
  /// Seeds the gradient of a recorded output before backward().
  void seed(const Tensor& output, Tensor gradient) { give(output, std::move(gradient)); }
  /// What a leaf collected; undefined when nothing reached it.
  Tensor collected(const Tensor& leaf);

 private:
  struct Node {
    const char* op;
    std::string layer;
    const char* flop_item;
    std::vector<std::uint64_t> outputs;
    Backward backward;
    bool is_loss;
  };

  Tensor taken_out(std::uint64_t id);
  /// The sum of a tensor without a bound gradient, held by nobody else.
  Tensor own_sum(const Tensor& x);

  Context& context_;
  std::vector<Node> nodes_;
  std::unordered_map<std::uint64_t, Tensor> gradients_;
  const Node* running_ = nullptr;
  std::vector<Tensor> added_into_;  // by the op at hand, while numbers that are not finite are looked for
};

/// Whether an op with these inputs has to be recorded.
bool wants_record(const Context& c, std::initializer_list<Tensor> inputs);

}  // namespace fathom
