// Models with weights of few bits: they compute what the numbers that their codes stand for do, and their
// cached decoding is their whole pass.
#include <cmath>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "infer/engine.h"
#include "infer/generate.h"
#include "kernels/error.h"
#include "src/ops/linear.h"
#include "tests/model/small_model.h"
#include "tests/quant/round_to_nearest.h"

namespace fathom::model_test {
namespace {

using quant_test::round_to_nearest;
using ::testing::HasSubstr;

struct Case {
  std::string name;
  RoutingConfig routing;
  SelectionRule rule;
  Device device;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

std::vector<Case> cases() {
  const Causal by_router{Causal::Logit::Router, 0.5}, by_predictor{Causal::Logit::Predictor, 0.5};
  std::vector<Case> all;
  for (const Device device : testing_support::devices()) {
    const auto add = [&](const char* name, const RoutingConfig& routing, const SelectionRule& rule) {
      all.push_back({fmt::format("{}_{}", testing_support::name_of(device), name), routing, rule, device});
    };
    add("dense", by(CausalMethod::None), Causal{});
    add("mod", routed(CausalMethod::Both, Gate::Sigmoid, 0.5), by_predictor);
    add("mod_top_k", routed(CausalMethod::Both, Gate::Tanh, 0.5), TopK{});
    add("moe", with_experts(by(CausalMethod::Predictor), RoutingKind::Moe), by_predictor);
    add("moe_by_token", tokens_choose(by(CausalMethod::None), RoutingKind::Moe, 2), by_router);
    add("mode_staged", with_experts(routed(CausalMethod::Predictor), RoutingKind::ModeStaged), by_predictor);
    add("mode_integrated", with_experts(by(CausalMethod::Both), RoutingKind::ModeIntegrated), by_router);
  }
  return all;
}

ModelConfig config() {
  ModelConfig m = small_config();
  m.kv_heads = 2;
  m.qk_norm = true;
  return m;
}

/// The same model in numbers: scale * code where weights are of few bits.
std::unique_ptr<Transformer> in_numbers(Context& c, const Transformer& packed) {
  auto model = std::make_unique<Transformer>(c, packed.config(), packed.routing(), false);
  for (const ParameterSpec& spec : packed.parameters().specs()) {
    const Tensor& to = model->parameters().master(spec.name);
    if (spec.is_packed) {
      from_host(c.backend(), to, dequantized(c.backend(), packed.parameters().packed(spec.name)));
    } else {
      c.backend().copy(to, packed.parameters().master(spec.name));
    }
  }
  model->parameters().refresh_working_copy(c);
  return model;
}

class PackedModel : public OnDevice<Case> {
 protected:
  std::vector<double> logits(Context& c, const Transformer& model, const Batch& batch) const {
    const NoGrad no_grad(c);
    return to_doubles(c.backend(), model.logits(c, model.forward(c, batch, GetParam().rule).hidden));
  }
};

TEST_P(PackedModel, ComputesWhatItsNumbersDo) {
  for (const bool invariant : {false, true}) {
    SmallModel m(DType::F32, config(), GetParam().routing, {.invariant = invariant}, GetParam().device);
    for (const auto& [bits, group] : {std::pair{4, 0}, {8, 0}, {4, 4}, {8, 2}}) {
      SCOPED_TRACE(fmt::format("invariant {} bits {} group {}", invariant, bits, group));
      const QuantizedModel q =
          quantize_model(m.context, m.model, {.bits = bits, .group = group}, round_to_nearest);
      ASSERT_EQ(q.relative_error.size(), 4U);
      for (const auto& [kind, error] : q.relative_error) {
        EXPECT_GT(error, bits == 4 ? 0.02 : 0.001) << kind;
        EXPECT_LT(error, bits == 4 ? 0.15 : 0.01) << kind;
      }
      const std::unique_ptr<Transformer> numbers = in_numbers(m.context, *q.model);
      for (const auto& [sequences, length] : {std::pair{1, 1}, {1, 5}, {3, 24}}) {
        const Batch batch = m.random_batch(sequences, length, 5);
        const std::vector<double> ours = logits(m.context, *q.model, batch);
        const std::vector<double> expected = logits(m.context, *numbers, batch);
        EXPECT_LT(relative_difference(ours, expected), 1e-5);
        if (invariant) {
          EXPECT_EQ(ours, expected);
        }
        // It is not the model that it was made from.
        EXPECT_GT(relative_difference(ours, logits(m.context, m.model, batch)), 1e-4);
      }
    }
  }
}

// Rows through the engine, in chunks, beside each other and one by one, to the bit.
TEST_P(PackedModel, DecodesAsTheWholePass) {
  if (!std::holds_alternative<Causal>(GetParam().rule)) return;
  SmallModel m(DType::F32, config(), GetParam().routing, {.invariant = true}, GetParam().device);
  const OnlineHadamards online{.down = true, .heads = true, .queries_keys = true};
  for (const Quantization& quantization :
       {Quantization{.bits = 4, .group = 4}, Quantization{.bits = 8, .group = 4},
        Quantization{.bits = 4, .activations = 8, .online = online},
        Quantization{.bits = 8, .group = 4, .activations = 4, .activation_clip = 0.9, .online = online},
        Quantization{.bits = 16, .kinds = {}, .online = online}}) {
    SCOPED_TRACE(fmt::format("{} bits of rows of {}", quantization.bits, quantization.activations));
    const QuantizedModel q = quantize_model(m.context, m.model, quantization, round_to_nearest);
    EngineOptions options;
    options.rule = std::get<Causal>(GetParam().rule);
    options.max_rows = 5;
    options.cache.bytes = 1 << 20;
    Engine engine(m.context, *q.model, options);
    std::map<RequestId, std::map<std::int64_t, std::vector<float>>> seen;
    std::map<RequestId, std::vector<std::int32_t>> ids;
    engine.observe_logits([&](RequestId id, std::int64_t position, std::span<const float> logits) {
      seen[id][position].assign(logits.begin(), logits.end());
    });
    for (const unsigned seed : {1U, 2U}) {
      const std::vector<std::int32_t> prompt = m.random_tokens(7 + 4 * seed, seed);
      ids[engine.submit({.prompt = prompt, .max_tokens = 9})] = prompt;
    }
    while (!engine.idle()) {
      for (const Event& e : engine.step()) {
        if (e.has_token) ids.at(e.request).push_back(e.token.id);
      }
    }
    EXPECT_EQ(engine.stats().whole_steps, 0);
    const auto vocab = static_cast<std::size_t>(config().vocab_size);
    for (const auto& [id, all] : ids) {
      const std::vector<float> whole = causal_logits(m.context, *q.model, all, options.rule);
      ASSERT_GE(seen.at(id).size(), 9U);
      for (const auto& [position, logits] : seen.at(id)) {
        const auto first = whole.begin() + static_cast<std::ptrdiff_t>((position - 1) * config().vocab_size);
        EXPECT_EQ(logits, std::vector<float>(first, first + static_cast<std::ptrdiff_t>(vocab)));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, PackedModel, ::testing::ValuesIn(cases()),
                         [](const auto& of_case) { return of_case.param.name; });

// On the CPU the weights of few bits stand beside embeddings and a head of bf16.
TEST(PackedModelOf, Bf16BesideFewBits) {
  SmallModel m(DType::F32, config(), routed(CausalMethod::Both));
  const QuantizedModel whole = quantize_model(m.context, m.model, {}, round_to_nearest);
  Context halves(make_cpu_backend({}, 2), DType::F32, DType::BF16);
  const QuantizedModel half = quantize_model(halves, m.model, {}, round_to_nearest);
  half.model->parameters().forget_masters(halves);
  const std::vector<std::int32_t> ids = m.random_tokens(20, 3);
  const std::vector<float> a = causal_logits(m.context, *whole.model, ids, Causal{}),
                           b = causal_logits(halves, *half.model, ids, Causal{});
  const double difference = relative_difference({b.begin(), b.end()}, {a.begin(), a.end()});
  EXPECT_GT(difference, 1e-5);
  EXPECT_LT(difference, 0.1);
}

TEST(PackedModelOf, FewBitsIsNotTrained) {
  SmallModel m(DType::F32, config(), by(CausalMethod::None));
  const QuantizedModel q = quantize_model(m.context, m.model, {}, round_to_nearest);
  Tape tape(m.context);
  const Recording recording(m.context, tape);
  try {
    q.model->forward(m.context, m.random_batch(1, 4, 5), TopK{});
    ADD_FAILURE() << "no error";
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr("cannot be trained"));
  }
  const PackedTensor w = q.model->parameters().packed("model.layers.0.mlp.down_proj.weight");
  EXPECT_THROW(ops::linear(m.context, m.context.zeros({2, 20}, DType::F32), w), InternalError);
}

TEST(PackedModelOf, GroupsDivideEveryRow) {
  SmallModel m(DType::F32, config(), by(CausalMethod::None));
  try {
    quantize_model(m.context, m.model, {.group = 16}, round_to_nearest);
    ADD_FAILURE() << "no error";
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr("mlp.down_proj.weight has rows of 20 columns, which groups of 16"));
  }
  const std::string norm = "model.norm.weight";
  EXPECT_THROW(m.model.parameters().packed(norm), InternalError);
  const QuantizedModel q = quantize_model(m.context, m.model, {}, round_to_nearest);
  EXPECT_THROW(q.model->parameters().get("model.layers.0.mlp.down_proj.weight"), InternalError);
  const PackedTensor w = q.model->parameters().packed("model.layers.0.mlp.down_proj.weight");
  EXPECT_THROW(q.model->parameters().put_packed("model.layers.0.self_attn.o_proj.weight", w), InternalError);
  EXPECT_THROW(q.model->parameters().put_packed(norm, w), InternalError);
}

TEST(PackedModelOf, WeightsThatAreNotFiniteAreNamed) {
  SmallModel m(DType::F32, config(), by(CausalMethod::None));
  m.context.backend().fill(m.model.parameters().master("model.layers.2.self_attn.o_proj.weight"), INFINITY);
  try {
    quantize_model(m.context, m.model, {}, round_to_nearest);
    ADD_FAILURE() << "no error";
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr("layers.2.self_attn.o_proj.weight"));
  }
}

}  // namespace
}  // namespace fathom::model_test
