#include "src/core/tensor.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {
std::uint64_t next_id() {
  static std::atomic<std::uint64_t> counter{1};
  return counter.fetch_add(1, std::memory_order_relaxed);
}
}  // namespace

struct Tensor::Impl {
  Storage storage;
  std::size_t offset = 0;
  Shape shape;
  DType dtype = DType::F32;
  std::uint64_t id = next_id();
  bool requires_grad = false;
  bool begins_anew = false;
  Tensor bound_gradient;
};

Tensor::Tensor(Storage storage, std::size_t offset, Shape shape, DType dtype)
    : impl_(std::make_shared<Impl>()) {
  impl_->storage = std::move(storage);
  impl_->offset = offset;
  impl_->shape = std::move(shape);
  impl_->dtype = dtype;
}

const Shape& Tensor::shape() const { return impl_->shape; }
DType Tensor::dtype() const { return impl_->dtype; }
void* Tensor::data() const { return static_cast<std::byte*>(impl_->storage.get()) + impl_->offset; }

View Tensor::view() const {
  if (!impl_) return {};
  return {data(), impl_->shape.size(), impl_->dtype};
}

std::uint64_t Tensor::id() const { return impl_->id; }
bool Tensor::requires_grad() const { return impl_ && impl_->requires_grad; }
void Tensor::set_requires_grad(bool value) { impl_->requires_grad = value; }
const Tensor& Tensor::bound_gradient() const { return impl_->bound_gradient; }
void Tensor::bind_gradient(const Tensor& gradient) { impl_->bound_gradient = gradient; }

bool Tensor::begins_anew() const { return impl_ && impl_->begins_anew; }
void Tensor::set_begins_anew(bool value) const { impl_->begins_anew = value; }

Tensor Tensor::detach() const { return {impl_->storage, impl_->offset, impl_->shape, impl_->dtype}; }

Tensor Tensor::rows(std::int64_t begin, std::int64_t end) const {
  if (begin < 0 || end < begin || end > dim(0)) {
    throw InternalError(fmt::format("[rows] {} to {} of a tensor of shape {}", begin, end, shape().str()));
  }
  std::vector<std::int64_t> dims = shape().dims();
  const std::int64_t row = dims[0] == 0 ? 0 : size() / dims[0];
  dims[0] = end - begin;
  return {impl_->storage, impl_->offset + static_cast<std::size_t>(begin * row) * size_of(impl_->dtype),
          Shape(std::move(dims)), impl_->dtype};
}

Tensor Tensor::reshape(Shape shape) const {
  if (shape.size() != size()) {
    throw InternalError(fmt::format("[reshape] {} to {}", this->shape().str(), shape.str()));
  }
  return {impl_->storage, impl_->offset, std::move(shape), impl_->dtype};
}

Tensor Tensor::without_data() const {
  Tensor t;
  if (!impl_) return t;
  t.impl_ = std::make_shared<Impl>(*impl_);
  t.impl_->storage = nullptr;
  return t;
}

// Copies share one Impl, and each Impl is one user of the storage.
long Tensor::owners() const { return impl_.use_count() + impl_->storage.use_count() - 1; }

template <typename T>
std::vector<T> to_host(Backend& backend, const Tensor& t) {
  if (t.dtype() != dtype_of<T>::value) {
    throw InternalError(
        fmt::format("[to_host] a tensor of {} read as {}", name_of(t.dtype()), name_of(dtype_of<T>::value)));
  }
  std::vector<T> values(static_cast<std::size_t>(t.size()));
  backend.copy_to_host(values.data(), t.data(), t.bytes());
  return values;
}

template <typename T>
void from_host(Backend& backend, const Tensor& t, const std::vector<T>& values) {
  if (t.dtype() != dtype_of<T>::value || t.size() != static_cast<std::int64_t>(values.size())) {
    throw InternalError(fmt::format("[from_host] {} values of {} into a tensor {} of {}", values.size(),
                                    name_of(dtype_of<T>::value), t.shape().str(), name_of(t.dtype())));
  }
  backend.copy_from_host(t.data(), values.data(), t.bytes());
}

template std::vector<float> to_host(Backend&, const Tensor&);
template std::vector<double> to_host(Backend&, const Tensor&);
template std::vector<std::int32_t> to_host(Backend&, const Tensor&);
template void from_host(Backend&, const Tensor&, const std::vector<float>&);
template void from_host(Backend&, const Tensor&, const std::vector<double>&);
template void from_host(Backend&, const Tensor&, const std::vector<std::int32_t>&);
template void from_host(Backend&, const Tensor&, const std::vector<std::int64_t>&);

namespace {

float from_bf16(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

// To the nearest, of two as near the even one; a NaN stays a NaN.
std::uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>(bits >> 16 | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

/// A tensor of any real type, on the host as T.
template <typename T>
std::vector<T> to_host_as(Backend& backend, const Tensor& t) {
  const auto converted = [](const auto& values) { return std::vector<T>(values.begin(), values.end()); };
  if (t.dtype() == DType::F64) return converted(to_host<double>(backend, t));
  if (t.dtype() != DType::BF16) return converted(to_host<float>(backend, t));
  std::vector<std::uint16_t> bits(static_cast<std::size_t>(t.size()));
  backend.copy_to_host(bits.data(), t.data(), t.bytes());
  std::vector<T> values(bits.size());
  std::transform(bits.begin(), bits.end(), values.begin(), from_bf16);
  return values;
}

}  // namespace

std::vector<double> to_doubles(Backend& backend, const Tensor& t) {
  return t.dtype() == DType::F64 ? to_host<double>(backend, t) : to_host_as<double>(backend, t);
}

std::vector<float> to_floats(Backend& backend, const Tensor& t) {
  return t.dtype() == DType::F32 ? to_host<float>(backend, t) : to_host_as<float>(backend, t);
}

void from_doubles(Backend& backend, const Tensor& t, const std::vector<double>& values) {
  if (t.dtype() == DType::F64) return from_host(backend, t, values);
  if (t.dtype() == DType::BF16) {
    if (t.size() != static_cast<std::int64_t>(values.size())) {
      throw InternalError(
          fmt::format("[from_doubles] {} values into a tensor {}", values.size(), t.shape().str()));
    }
    std::vector<std::uint16_t> bits(values.size());
    std::transform(values.begin(), values.end(), bits.begin(),
                   [](double x) { return to_bf16(static_cast<float>(x)); });
    backend.copy_from_host(t.data(), bits.data(), t.bytes());
    return;
  }
  from_host(backend, t, std::vector<float>(values.begin(), values.end()));
}

double item(Backend& backend, const Tensor& t) {
  if (t.size() != 1) throw InternalError(fmt::format("[item] a tensor of shape {}", t.shape().str()));
  return to_doubles(backend, t)[0];
}

}  // namespace fathom
