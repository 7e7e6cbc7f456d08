// A model small enough to look at from every side, with parameters large enough that every term of it shows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "src/autograd/tape.h"
#include "src/model/transformer.h"
#include "tests/devices.h"
#include "tests/relative_difference.h"

namespace fathom::model_test {

using testing_support::Device;
using testing_support::relative_difference;

inline ModelConfig small_config() {
  ModelConfig m;
  m.vocab_size = 23;
  m.width = 16;
  m.depth = 4;
  m.heads = 4;
  m.kv_heads = 4;
  m.ffn_hidden = 20;
  m.max_seq_len = 64;
  return m;
}

/// Blocks 1, 3, ... are routed.
inline RoutingConfig routed(CausalMethod method, Gate gate = Gate::Raw, double capacity = 0.25) {
  RoutingConfig r;
  r.kind = RoutingKind::Mod;
  r.every = 2;
  r.first = 1;
  r.capacity = capacity;
  r.gate = gate;
  r.causal.method = method;
  r.causal.aux_weight = 0.3;
  r.causal.predictor_hidden = 6;
  return r;
}

/// Nothing is routed by itself; what is trained of a causal rule, for experts that choose.
inline RoutingConfig by(CausalMethod method) {
  RoutingConfig r = routed(method);
  r.kind = RoutingKind::None;
  return r;
}

/// Three experts in every MLP, with two no-ops where `kind` has them.
inline RoutingConfig with_experts(RoutingConfig r, RoutingKind kind, double capacity_factor = 1.0) {
  r.kind = kind;
  r.experts.count = 3;
  r.experts.capacity_factor = capacity_factor;
  r.experts.noop = kind == RoutingKind::ModeIntegrated ? 2 : 0;
  return r;
}

/// The same, of which each token chooses `top_k`; a capacity factor of 0 drops none.
inline RoutingConfig tokens_choose(RoutingConfig r, RoutingKind kind, std::int64_t top_k,
                                   double capacity_factor = 0) {
  r = with_experts(r, kind, capacity_factor);
  r.experts.choice = ExpertsChoose::Token;
  r.experts.top_k = top_k;
  r.experts.balance_weight = 0.2;
  r.experts.z_weight = 0.1;
  return r;
}

/// A copy of every gradient, or value, by name.
using Snapshot = std::map<std::string, std::vector<double>>;

/// A fixture that skips its tests where their device is not there. `Case` has a member `device`, or is one.
template <typename Case>
class OnDevice : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override { testing_support::skip_without(testing_support::open_device(device())); }
  Device device() const {
    if constexpr (std::is_same_v<Case, Device>) {
      return this->GetParam();
    } else {
      return this->GetParam().device;
    }
  }
};

inline std::string device_name(const ::testing::TestParamInfo<Device>& p) {
  return testing_support::name_of(p.param);
}

class SmallModel {
 public:
  /// The device must be there (OnDevice).
  SmallModel(DType dtype, const ModelConfig& config, const RoutingConfig& routing,
             const BackendOptions& options = {}, Device device = Device::Cpu)
      : context(testing_support::open_device(device, options).backend, dtype),
        model(context, config, routing, true) {
    fill(7);
  }

  /// Unit variance is kept by each matrix, norms are spread about 1, router scores about 0. A parameter's
  /// values are a function of its name and the seed.
  void fill(std::uint64_t seed) {
    model.initialise(context, seed);
    for (const ParameterSpec& spec : model.parameters().specs()) {
      const bool norm = spec.name.find("norm") != std::string::npos;
      const Tensor& t = model.parameters().get(spec.name);
      std::mt19937_64 generator(std::hash<std::string>{}(spec.name) ^ seed);
      std::normal_distribution<double> normal;
      const double stddev =
          norm || spec.shape.rank() == 1 ? 0.2 : 1.0 / std::sqrt(static_cast<double>(spec.shape[-1]));
      std::vector<double> values(static_cast<std::size_t>(t.size()));
      for (double& x : values) x = (norm ? 1.0 : 0.0) + stddev * normal(generator);
      from_doubles(context.backend(), t, values);
    }
  }

  /// Adds the gradients of weight * objective to those there are.
  LossSums backward(const Batch& batch, const SelectionRule& rule, double weight = 1.0) {
    Tape tape(context);
    context.set_tape(&tape);
    const ForwardResult result = model.forward(context, batch, rule);
    const LossSums sums = model.objective(context, batch, result, weight);
    context.set_tape(nullptr);
    tape.backward();
    return sums;
  }

  void zero_gradients() { context.backend().fill(model.parameters().gradients(), 0.0); }

  std::vector<double> host(const Tensor& t) { return to_doubles(context.backend(), t); }

  Snapshot gradients() {
    Snapshot all;
    for (const ParameterSpec& s : model.parameters().specs()) {
      all[s.name] = host(model.parameters().get(s.name).bound_gradient());
    }
    return all;
  }
  Snapshot values() {
    Snapshot all;
    for (const ParameterSpec& s : model.parameters().specs())
      all[s.name] = host(model.parameters().get(s.name));
    return all;
  }

  Batch random_batch(std::int64_t batch, std::int64_t seq, unsigned seed,
                     const std::vector<std::int32_t>& documents = {}) {
    return make_batch(context, batch, seq, random_tokens(batch * seq, seed),
                      random_tokens(batch * seq, seed + 1), documents);
  }
  std::vector<std::int32_t> random_tokens(std::int64_t n, unsigned seed) const {
    std::mt19937 generator(seed);
    std::uniform_int_distribution<std::int32_t> any(0,
                                                    static_cast<std::int32_t>(model.config().vocab_size) - 1);
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
    for (std::int32_t& t : tokens) t = any(generator);
    return tokens;
  }

  Context context;
  Transformer model;
};

}  // namespace fathom::model_test
