// A tensor: storage, shape and dtype; contiguous, row-major, cheap to copy (copies share the storage).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "src/core/allocator.h"
#include "src/core/shape.h"

namespace fathom {

class Tensor {
 public:
  Tensor() = default;
  /// Takes `storage` from byte `offset` on.
  Tensor(Storage storage, std::size_t offset, Shape shape, DType dtype);

  bool defined() const { return impl_ != nullptr; }
  explicit operator bool() const { return defined(); }
  const Shape& shape() const;
  std::int64_t dim(std::int64_t i) const { return shape()[i]; }
  std::int64_t size() const { return shape().size(); }
  DType dtype() const;
  std::size_t bytes() const { return static_cast<std::size_t>(size()) * size_of(dtype()); }

  void* data() const;
  View view() const;
  operator View() const { return view(); }                  // NOLINT: kernels take views
  operator ConstView() const { return ConstView(view()); }  // NOLINT

  /// Identifies this tensor on the tape; copies of a Tensor share it, detach() and rows() do not.
  std::uint64_t id() const;
  bool requires_grad() const;
  /// Marks a leaf (or an op's output) whose gradient is wanted.
  void set_requires_grad(bool value);
  /// Where the gradient of a parameter is added up; undefined for all others.
  const Tensor& bound_gradient() const;
  void bind_gradient(const Tensor& gradient);

  /// A gradient's sum that begins anew: its values count for nothing, and what comes next overwrites them
  /// (Tape::begin_or_sum, Tape::sum_into). Copies share the mark.
  bool begins_anew() const;
  void set_begins_anew(bool value) const;

  /// The same storage without a history: no gradient flows through it.
  Tensor detach() const;
  /// Rows [begin, end) of the first dimension, sharing the storage; no history.
  Tensor rows(std::int64_t begin, std::int64_t end) const;
  /// The same elements under another shape; no history.
  Tensor reshape(Shape shape) const;
  /// This tensor's identity, shape and bound gradient without its data: what a backward needs of an input
  /// whose values it does not read, so that the tape does not keep them.
  Tensor without_data() const;
  /// How many tensors hold the storage, copies of this one included: 1 when it may be written over.
  long owners() const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

/// A whole tensor as host values. T must be the tensor's element type.
template <typename T>
std::vector<T> to_host(Backend& backend, const Tensor& t);
template <typename T>
void from_host(Backend& backend, const Tensor& t, const std::vector<T>& values);
/// A floating tensor of any dtype as doubles.
std::vector<double> to_doubles(Backend& backend, const Tensor& t);
std::vector<float> to_floats(Backend& backend, const Tensor& t);
/// Sets a floating tensor from doubles, rounded to its dtype.
void from_doubles(Backend& backend, const Tensor& t, const std::vector<double>& values);
/// The only element of a floating tensor.
double item(Backend& backend, const Tensor& t);

}  // namespace fathom
