// The parameters of a model, in flat arenas of one layout: the masters and the gradients in the stat dtype,
// and, where that is not the compute dtype (for inference: the context's weight dtype), a working copy in
// that. Ordered by optimizer group, so that the optimizer, the gradient norm and an all-reduce are a few
// launches over flat memory.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "src/ops/packed_tensor.h"

namespace fathom {

/// What the optimizer does with a parameter.
enum class ParameterGroup : std::uint8_t {
  Decayed,    // matrices: AdamW with weight decay
  Undecayed,  // norms, routers
  Predictor,  // predictor routers: clipped on their own, so that they never change what the model learns
};
inline constexpr std::size_t kParameterGroups = 3;

/// How a parameter starts.
struct Init {
  enum class Kind : std::uint8_t { Zeros, Ones, Normal } kind = Kind::Normal;
  double stddev = 0.02;
};

struct ParameterSpec {
  std::string name;  // Hugging Face Llama's names (docs/formats.md)
  Shape shape;
  ParameterGroup group = ParameterGroup::Decayed;
  Init init;
  bool is_product = false;  // the weight of a product, even with one row or of one expert
  bool is_packed = false;   // of few bits, outside of the arenas

  /// Vectors (norms, biases, the weights of scores) are computed with in the stat dtype, matrices in the
  /// compute dtype (kernels/backend.h).
  bool is_vector() const { return !is_product && (shape.rank() == 1 || shape[0] == 1); }
};

/// A run of elements of the arenas.
struct ArenaRange {
  std::int64_t begin = 0;
  std::int64_t size = 0;
};

class ParameterSet {
 public:
  /// Declares a parameter; before allocate(). Names are unique.
  void declare(ParameterSpec spec);
  /// A declared parameter is to be of few bits; before allocate(), which leaves it out. put_packed() gives
  /// it.
  void declare_packed(const std::string& name);
  /// Makes the arenas and binds each parameter's gradient into them. `gradients` false: for inference.
  void allocate(Context& c, bool gradients);
  /// Starts every parameter from its Init: a pure function of (seed, name), so that adding one changes no
  /// other.
  void initialise(Context& c, std::uint64_t seed);
  /// Rounds the masters into the working copy, after they were set from outside (loading a checkpoint).
  void refresh_working_copy(Context& c);

  /// For inference, where matrices have a working copy: the memory of their masters is free again. What reads
  /// masters afterwards is an InternalError.
  void forget_masters(Context& c);

  const std::vector<ParameterSpec>& specs() const { return specs_; }
  bool has(const std::string& name) const { return names_.contains(name); }
  /// What ops read: a vector's master, a matrix's working copy (or its master, where that is the same).
  const Tensor& get(const std::string& name) const;
  /// InternalError unless `name` was declared as of few bits, and has this shape.
  void put_packed(const std::string& name, PackedTensor value);
  /// Of a parameter of few bits; InternalError: `name` is none, or has no value yet.
  const PackedTensor& packed(const std::string& name) const;
  bool is_packed(const std::string& name) const { return packed_.contains(name); }
  /// What the optimizer changes and a checkpoint holds.
  const Tensor& master(const std::string& name) const;

  /// The arenas, [size] each; padding between parameters stays zero. The working copy is undefined where the
  /// masters are of the compute dtype.
  const Tensor& masters() const { return masters_; }
  const Tensor& working() const { return working_; }
  const Tensor& gradients() const { return gradients_; }
  /// Where a parameter begins in them.
  std::int64_t offset(const std::string& name) const;
  ArenaRange range(ParameterGroup group) const { return ranges_[static_cast<std::size_t>(group)]; }
  /// Elements of all parameters, without padding.
  std::int64_t count() const;

 private:
  std::vector<ParameterSpec> specs_;
  std::set<std::string> names_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, Tensor> master_tensors_;
  std::map<std::string, std::int64_t> offsets_;
  std::map<std::string, PackedTensor> packed_;
  Tensor masters_;
  Tensor working_;
  Tensor gradients_;
  ArenaRange ranges_[kParameterGroups];
};

}  // namespace fathom
