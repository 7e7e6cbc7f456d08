// What an op needs besides its arguments: the backend, the allocator, the tape, and where in the model we
// are.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "src/core/tensor.h"

namespace fathom {

class Tape;

/// A non-finite number that tracing found: the first op whose output holds one.
struct NonFinite {
  std::string op;     // "swiglu", or "swiglu backward"
  std::string layer;  // "layer 3"; empty outside the blocks
  std::int64_t count = 0;
};

class Context {
 public:
  /// `compute` is the dtype of activations and of the weights of products and lookups.
  Context(std::shared_ptr<Backend> backend, DType compute) : Context(std::move(backend), compute, compute) {}
  /// `weights`: theirs, of models without gradients: bf16 beside fp32 on the CPU, which is half as much to
  /// read for each token.
  Context(std::shared_ptr<Backend> backend, DType compute, DType weights);

  Backend& backend() const { return *backend_; }
  const std::shared_ptr<Backend>& shared_backend() const { return backend_; }
  Allocator& allocator() { return allocator_; }
  /// Tensors come from `a` from now on; returns what they came from. Use MemoryScope.
  Allocator exchange_allocator(Allocator a) { return std::exchange(allocator_, std::move(a)); }
  DType compute_dtype() const { return compute_; }
  DType weight_dtype() const { return weights_; }
  /// fp32, or fp64 when the compute dtype is fp64: router scores, losses, norms' reciprocals, gradients of
  /// weights.
  DType stat_dtype() const { return compute_ == DType::F64 ? DType::F64 : DType::F32; }

  Tensor empty(Shape shape, DType dtype, MemoryTag tag = MemoryTag::Activations);
  Tensor empty(Shape shape) { return empty(std::move(shape), compute_); }
  Tensor empty_stat(Shape shape) { return empty(std::move(shape), stat_dtype()); }
  Tensor zeros(Shape shape, DType dtype, MemoryTag tag = MemoryTag::Activations);

  /// Where ops record their backwards; null: nothing is recorded (evaluation, inference, NoGrad).
  Tape* tape() const { return tape_; }
  void set_tape(Tape* tape) { tape_ = tape; }

  /// "layer 3": put into errors, recorded with each op. Set by LayerScope.
  const std::string& layer() const { return layer_; }
  void set_layer(std::string layer) { layer_ = std::move(layer); }

  /// With tracing on, every op's output is checked and the first non-finite one is kept. Slow; the trainer
  /// turns it on to name the culprit of a loss that is not finite.
  void trace_nonfinite(bool on);
  bool traces_nonfinite() const { return trace_; }
  const NonFinite* found_nonfinite() const { return found_ ? found_.get() : nullptr; }
  void check(const char* op, const char* direction, const Tensor& output);

 private:
  std::shared_ptr<Backend> backend_;
  Allocator allocator_;
  DType compute_, weights_;
  Tape* tape_ = nullptr;
  std::string layer_;
  bool trace_ = false;
  std::unique_ptr<NonFinite> found_;
};

/// Nothing is recorded while it lives.
class NoGrad {
 public:
  explicit NoGrad(Context& c) : context_(c), tape_(c.tape()) { c.set_tape(nullptr); }
  ~NoGrad() { context_.set_tape(tape_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  Context& context_;
  Tape* tape_;
};

/// Ops record on `tape` while it lives, however the scope is left.
class Recording {
 public:
  Recording(Context& c, Tape& tape) : context_(c), outer_(c.tape()) { c.set_tape(&tape); }
  ~Recording() { context_.set_tape(outer_); }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

 private:
  Context& context_;
  Tape* outer_;
};

/// Tensors made while it lives come from another pool of memory.
class MemoryScope {
 public:
  MemoryScope(Context& c, const Allocator& pool) : context_(c), outer_(c.exchange_allocator(pool)) {}
  ~MemoryScope() { context_.exchange_allocator(std::move(outer_)); }
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;

 private:
  Context& context_;
  Allocator outer_;
};

/// Names the layer while it lives.
class LayerScope {
 public:
  LayerScope(Context& c, std::string layer) : context_(c), outer_(c.layer()) {
    c.set_layer(std::move(layer));
  }
  ~LayerScope() { context_.set_layer(std::move(outer_)); }
  LayerScope(const LayerScope&) = delete;
  LayerScope& operator=(const LayerScope&) = delete;

 private:
  Context& context_;
  std::string outer_;
};

/// Books the matrix work launched while it lives, and that of its backward, under `item`
/// (kernels/flop_log.h).
class FlopItem {
 public:
  FlopItem(Context& c, const char* item) : log_(c.backend().flop_log), outer_(log_.item()) {
    log_.set_item(item);
  }
  ~FlopItem() { log_.set_item(outer_); }
  FlopItem(const FlopItem&) = delete;
  FlopItem& operator=(const FlopItem&) = delete;

 private:
  FlopLog& log_;
  const char* outer_;
};

}  // namespace fathom
