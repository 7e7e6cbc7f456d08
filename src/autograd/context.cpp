#include "src/autograd/context.h"

namespace fathom {

Context::Context(std::shared_ptr<Backend> backend, DType compute, DType weights)
    : backend_(std::move(backend)), allocator_(backend_), compute_(compute), weights_(weights) {}

Tensor Context::empty(Shape shape, DType dtype, MemoryTag tag) {
  const std::size_t bytes = static_cast<std::size_t>(shape.size()) * size_of(dtype);
  return {allocator_.allocate(bytes, tag), 0, std::move(shape), dtype};
}

Tensor Context::zeros(Shape shape, DType dtype, MemoryTag tag) {
  Tensor t = empty(std::move(shape), dtype, tag);
  backend_->fill(t, 0.0);
  return t;
}

void Context::trace_nonfinite(bool on) {
  trace_ = on;
  found_.reset();
}

void Context::check(const char* op, const char* direction, const Tensor& output) {
  if (!trace_ || found_ || !output.defined() || !is_floating(output.dtype()) || output.size() == 0) return;
  const std::int64_t count = backend_->count_nonfinite(output);
  if (count > 0) found_ = std::make_unique<NonFinite>(NonFinite{std::string(op) + direction, layer_, count});
}

}  // namespace fathom
