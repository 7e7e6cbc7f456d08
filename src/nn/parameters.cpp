#include "src/nn/parameters.h"

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {

// Every parameter starts at a multiple of 256 bytes in arenas of 2-byte elements too: what cuBLASLt's fastest
// products ask for.
constexpr std::int64_t kAlignment = 128;

std::int64_t padded(std::int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

// FNV-1a: the random stream of a parameter is its name.
std::uint64_t stream_of(const std::string& name) {
  std::uint64_t hash = 14695981039346656037ULL;
  for (char ch : name) hash = (hash ^ static_cast<unsigned char>(ch)) * 1099511628211ULL;
  return hash;
}

Tensor part_of(const Tensor& arena, std::int64_t begin, const Shape& shape) {
  return arena.rows(begin, begin + shape.size()).reshape(shape);
}

}  // namespace

void ParameterSet::declare(ParameterSpec spec) {
  if (!names_.insert(spec.name).second)
    throw InternalError(fmt::format("[parameters] {} is declared twice", spec.name));
  specs_.push_back(std::move(spec));
}

void ParameterSet::declare_packed(const std::string& name) {
  for (ParameterSpec& spec : specs_) {
    if (spec.name != name) continue;
    spec.is_packed = true;
    packed_[name] = {};
    return;
  }
  throw InternalError(fmt::format("[parameters] there is no {}", name));
}

void ParameterSet::allocate(Context& c, bool gradients) {
  std::int64_t total = 0;
  for (std::size_t g = 0; g < kParameterGroups; ++g) {
    ranges_[g].begin = total;
    for (const ParameterSpec& spec : specs_) {
      if (static_cast<std::size_t>(spec.group) != g || spec.is_packed) continue;
      offsets_[spec.name] = total;
      total += padded(spec.shape.size());
    }
    ranges_[g].size = total - ranges_[g].begin;
  }
  masters_ = c.zeros({total}, c.stat_dtype(), MemoryTag::Parameters);
  const DType weights = gradients ? c.compute_dtype() : c.weight_dtype();
  if (weights != c.stat_dtype()) working_ = c.zeros({total}, weights, MemoryTag::Parameters);
  if (gradients) gradients_ = c.zeros({total}, c.stat_dtype(), MemoryTag::Gradients);
  if (gradients && !packed_.empty()) throw InternalError("[parameters] of few bits have no gradients");
  for (const ParameterSpec& spec : specs_) {
    if (spec.is_packed) continue;
    const std::int64_t offset = offsets_.at(spec.name);
    const Tensor master = part_of(masters_, offset, spec.shape);
    master_tensors_[spec.name] = master;
    Tensor t = working_.defined() && !spec.is_vector() ? part_of(working_, offset, spec.shape) : master;
    if (gradients) {
      t.set_requires_grad(true);
      t.bind_gradient(part_of(gradients_, offset, spec.shape));
    }
    tensors_[spec.name] = t;
  }
}

void ParameterSet::initialise(Context& c, std::uint64_t seed) {
  for (const ParameterSpec& spec : specs_) {
    const Tensor& t = master(spec.name);
    switch (spec.init.kind) {
      case Init::Kind::Zeros:
        c.backend().fill(t, 0.0);
        break;
      case Init::Kind::Ones:
        c.backend().fill(t, 1.0);
        break;
      case Init::Kind::Normal:
        c.backend().fill_normal(t, spec.init.stddev, seed, stream_of(spec.name));
        break;
    }
  }
  refresh_working_copy(c);
}

void ParameterSet::refresh_working_copy(Context& c) {
  if (working_.defined()) c.backend().cast(working_, masters_);
}

void ParameterSet::forget_masters(Context& c) {
  if (!working_.defined() || gradients_.defined()) return;
  for (const ParameterSpec& spec : specs_) {
    if (!spec.is_vector()) continue;
    Tensor own = c.empty(spec.shape, masters_.dtype(), MemoryTag::Parameters);
    c.backend().copy(own, tensors_.at(spec.name));
    tensors_[spec.name] = own;
  }
  master_tensors_.clear();
  masters_ = Tensor();
}

const Tensor& ParameterSet::get(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw InternalError(fmt::format("[parameters] there is no {}", name));
  return found->second;
}

void ParameterSet::put_packed(const std::string& name, PackedTensor value) {
  for (const ParameterSpec& spec : specs_) {
    if (spec.name != name || !spec.is_packed || spec.shape != value.shape) continue;
    packed_[name] = std::move(value);
    return;
  }
  throw InternalError(fmt::format("[parameters] there is no {} {} of few bits", name, value.shape.str()));
}

const PackedTensor& ParameterSet::packed(const std::string& name) const {
  const auto found = packed_.find(name);
  if (found == packed_.end() || !found->second.defined())
    throw InternalError(fmt::format("[parameters] there is no {} of few bits", name));
  return found->second;
}

const Tensor& ParameterSet::master(const std::string& name) const {
  const auto found = master_tensors_.find(name);
  if (found == master_tensors_.end()) throw InternalError(fmt::format("[parameters] there is no {}", name));
  return found->second;
}

std::int64_t ParameterSet::offset(const std::string& name) const {
  const auto found = offsets_.find(name);
  if (found == offsets_.end()) throw InternalError(fmt::format("[parameters] there is no {}", name));
  return found->second;
}

std::int64_t ParameterSet::count() const {
  std::int64_t n = 0;
  for (const ParameterSpec& spec : specs_) n += spec.shape.size();
  return n;
}

}  // namespace fathom
