// Models quantized block by block on what the calibration shows.
#include "infer/quant/calibrate.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "infer/quant/calibration_size.h"
#include "infer/quant/compare.h"
#include "infer/quant/product_hessians.h"
#include "infer/quant/rotate.h"
#include "kernels/error.h"
#include "tests/quant/model_kinds.h"

namespace fathom::model_test {
namespace {

using ::testing::HasSubstr;

constexpr std::int64_t kSeq = 32;

class Calibrated : public ::testing::TestWithParam<ModelKind> {
 protected:
  Calibrated() : m(DType::F32, small_config(), GetParam().routing) {}

  CalibratedModel by(Quantizer quantizer, bool refit = false) {
    return quantize_calibrated(m.context, m.model, quantization, tokens,
                               {.rule = GetParam().rule,
                                .seq = kSeq,
                                .by = quantizer,
                                .gptq = {},
                                .refit_thresholds = refit,
                                .progress = {}});
  }
  // Mean squared difference of the logits of other tokens from the model's own.
  double distance(const Transformer& model) {
    const NoGrad no_grad(m.context);
    const Batch batch = m.random_batch(8, kSeq, 91);
    const auto of = [&](const Transformer& t) {
      return to_doubles(m.context.backend(),
                        t.logits(m.context, t.forward(m.context, batch, GetParam().rule).hidden));
    };
    const std::vector<double> ours = of(model), own = of(m.model);
    double sum = 0;
    for (std::size_t i = 0; i < own.size(); ++i) sum += (ours[i] - own[i]) * (ours[i] - own[i]);
    return sum / static_cast<double>(own.size());
  }

  SmallModel m;
  Quantization quantization{.method = "gptq"};
  std::vector<std::int32_t> tokens = m.random_tokens(24 * kSeq + 5, 3);  // 5 are no sequence
};

TEST_P(Calibrated, GptqLosesLessOfEachLayersOutputs) {
  const CalibratedModel nearest = by(Quantizer::RoundToNearest), gptq = by(Quantizer::Gptq);
  ASSERT_EQ(nearest.matrices.size(), gptq.matrices.size());
  double sum_nearest = 0, sum_gptq = 0;
  int better = 0;
  for (std::size_t i = 0; i < gptq.matrices.size(); ++i) {
    const CalibratedMatrix &n = nearest.matrices[i], &g = gptq.matrices[i];
    SCOPED_TRACE(fmt::format("{} {}: {} tokens", g.parameter, g.expert, g.tokens));
    EXPECT_EQ(n.parameter, g.parameter);
    EXPECT_EQ(n.expert, g.expert);
    EXPECT_EQ(n.by, Quantizer::RoundToNearest);
    EXPECT_EQ(n.failure, "");
    if (g.tokens == 0) {
      EXPECT_THAT(g.failure, HasSubstr("no token"));
      continue;
    }
    EXPECT_EQ(g.by, Quantizer::Gptq) << g.failure;
    EXPECT_EQ(g.damping, 0.01);
    EXPECT_GT(g.weight_error, 0.02);
    EXPECT_LT(g.weight_error, 0.3);
    sum_nearest += n.output_error;
    sum_gptq += g.output_error;
    better += g.output_error < n.output_error ? 1 : 0;
  }
  EXPECT_LT(sum_gptq, 0.8 * sum_nearest);
  EXPECT_GT(better, 0.8 * static_cast<double>(gptq.matrices.size()));
  RecordProperty("gptq_over_rtn", fmt::format("{:.3f}", sum_gptq / sum_nearest));
}

TEST_P(Calibrated, EachBlockReadsWhatTheQuantizedOnesBeforeItGive) {
  const CalibratedModel made = by(Quantizer::Gptq);
  const NoGrad no_grad(m.context);
  const std::vector<Batch> batches = calibration_batches(m.context, tokens, kSeq);
  ASSERT_EQ(batches.size(), 1U);
  Tensor stream = m.model.embed(m.context, batches[0]);
  std::size_t next = 0;
  for (std::int64_t layer = 0; layer < m.model.config().depth; ++layer) {
    SCOPED_TRACE(layer);
    ProductHessians hessians;
    ForwardResult decided;
    m.model.run_block(m.context, layer, stream, batches[0], GetParam().rule, decided, hessians.observer());
    for (const ParameterSpec& spec : made.quantized.model->parameters().specs()) {
      if (!spec.is_packed || !spec.name.starts_with(fmt::format("model.layers.{}.", layer))) continue;
      const std::vector<float> w = to_floats(m.context.backend(), m.model.parameters().master(spec.name));
      const std::vector<float> held =
          dequantized(m.context.backend(), made.quantized.model->parameters().packed(spec.name));
      const std::int64_t experts = spec.shape.rank() == 3 ? spec.shape[0] : 1;
      const std::size_t each = w.size() / static_cast<std::size_t>(experts);
      for (std::int64_t e = 0; e < experts; ++e) {
        const std::size_t first = static_cast<std::size_t>(e) * each;
        const QuantizedLayer expected = quantize_matrix(std::span(w).subspan(first, each), spec.shape[-2],
                                                        spec.shape[-1], {}, hessians.find(spec.name, e));
        const std::vector<float> numbers = dequantize<float>(expected.matrix);
        EXPECT_TRUE(
            std::equal(numbers.begin(), numbers.end(), held.begin() + static_cast<std::ptrdiff_t>(first)))
            << spec.name << " " << e;
        const CalibratedMatrix& said = made.matrices.at(next++);
        EXPECT_EQ(said.parameter, spec.name);
        EXPECT_EQ(said.expert, e);
        EXPECT_EQ(said.tokens, hessians.tokens(spec.name, e));
        EXPECT_EQ(said.has_few_tokens(), said.tokens < spec.shape[-1]);
      }
      if (layer == 0 && spec.name.ends_with("qkv_proj.weight")) {
        EXPECT_EQ(made.matrices.at(next - 1).tokens, 24 * kSeq);
      }
    }
    stream = made.quantized.model->run_block(m.context, layer, stream, batches[0], GetParam().rule, decided);
  }
  EXPECT_EQ(next, made.matrices.size());
}

TEST_P(Calibrated, TwiceIsTheSame) {
  const CalibratedModel once = by(Quantizer::Gptq, true), again = by(Quantizer::Gptq, true);
  for (const ParameterSpec& spec : once.quantized.model->parameters().specs()) {
    if (!spec.is_packed) continue;
    EXPECT_EQ(dequantized(m.context.backend(), once.quantized.model->parameters().packed(spec.name)),
              dequantized(m.context.backend(), again.quantized.model->parameters().packed(spec.name)));
  }
  EXPECT_GT(distance(*once.quantized.model), 1e-6);
  EXPECT_EQ(distance(*once.quantized.model), distance(*again.quantized.model));
}

// The shares of the whole model before are those of the quantized one now.
TEST_P(Calibrated, ThresholdsKeepTheirShares) {
  const CalibratedModel made = by(Quantizer::Gptq, true);
  const RoutingConfig& routing = GetParam().routing;
  const Refit what = what_to_refit(routing, GetParam().rule);
  EXPECT_EQ(made.rule.has_value(), what == Refit::OneThreshold);
  if (what == Refit::Nothing) {
    EXPECT_TRUE(made.thresholds.empty());
    return;
  }
  const NoGrad no_grad(m.context);
  DecisionCounts before, after;
  for (const Batch& batch : calibration_batches(m.context, tokens, kSeq)) {
    before.add(m.context, m.model.forward(m.context, batch, GetParam().rule));
    const SelectionRule rule = made.rule ? SelectionRule(*made.rule) : GetParam().rule;
    after.add(m.context, made.quantized.model->forward(m.context, batch, rule));
  }
  if (what == Refit::OneThreshold) {
    // Of all layers and experts together.
    ASSERT_EQ(made.thresholds.size(), 1U);
    const RefittedThreshold& t = made.thresholds[0];
    EXPECT_EQ(t.layer, -1);
    EXPECT_NEAR(made.rule->threshold, 0.5, 0.1);
    EXPECT_NE(made.rule->threshold, 0.5);
    double was = 0, is = 0;
    std::int64_t deciders = 0;
    for (const std::int64_t layer :
         routing.experts_choose() ? m.model.expert_layers() : m.model.routed_layers()) {
      for (std::int64_t e = routing.experts_choose() ? 0 : -1;
           e < (routing.experts_choose() ? routing.experts.count : 0); ++e, ++deciders) {
        was += before.share(layer, e);
        is += after.share(layer, e);
      }
    }
    EXPECT_NEAR(t.share_before, was / static_cast<double>(deciders), 1e-9);
    EXPECT_NEAR(t.share_after, t.share_before, 1e-3);
    EXPECT_NEAR(is / static_cast<double>(deciders), t.share_before, 5e-3);
    return;
  }
  std::size_t expected = m.model.routed_layers().size();
  if (routing.experts_choose()) {
    expected += m.model.expert_layers().size() * static_cast<std::size_t>(routing.experts.count);
  }
  ASSERT_EQ(made.thresholds.size(), expected);
  double moved = 0;
  for (const RefittedThreshold& t : made.thresholds) {
    SCOPED_TRACE(fmt::format("layer {} expert {}", t.layer, t.expert));
    EXPECT_NEAR(t.share_before, before.share(t.layer, t.expert), 1e-12);
    EXPECT_NEAR(t.share_after, t.share_before, 2.0 / (24 * kSeq) + (t.expert >= 0 ? 0.01 : 0));
    EXPECT_NEAR(after.share(t.layer, t.expert), t.share_after, 1e-3);
    moved += std::abs(t.share_unfitted - t.share_before);
  }
  EXPECT_GT(moved, 0.005);
}

// A norm's scales of a few channels are raised, and what reads them is lowered: the same function, with
// channels that stand out of what the products read, as trained models have them.
void plant_outliers(SmallModel& m) {
  constexpr double kFactor = 32;
  Backend& backend = m.context.backend();
  ParameterSet& p = m.model.parameters();
  const auto width = static_cast<std::size_t>(m.model.config().width);
  const auto scale = [&](const std::string& name, double factor) {
    if (!p.has(name)) return;
    std::vector<double> values = to_doubles(backend, p.master(name));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] *= i % width < 2 ? factor : 1.0;
    from_doubles(backend, p.master(name), values);
  };
  for (std::int64_t layer = 0; layer < m.model.config().depth; ++layer) {
    const std::string at = fmt::format("model.layers.{}.", layer);
    for (const char* norm : {"input_layernorm.weight", "post_attention_layernorm.weight"})
      scale(at + norm, kFactor);
    for (const char* reader :
         {"self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight", "mlp.experts.gate_up_proj.weight",
          "mlp.router.weight", "mlp.router_predictor.0.weight"})
      scale(at + reader, 1 / kFactor);
  }
}

// Where channels stand out, rounding to the nearest loses them; a rotation spreads them first. GPTQ helps
// both.
TEST_P(Calibrated, OutlierChannelsNeedARotation) {
  const Batch batch = m.random_batch(2, kSeq, 8);
  const auto logits = [&](const Transformer& model) {
    const NoGrad no_grad(m.context);
    return m.host(model.logits(m.context, model.forward(m.context, batch, GetParam().rule).hidden));
  };
  const std::vector<double> own = logits(m.model);
  plant_outliers(m);
  EXPECT_LT(relative_difference(logits(m.model), own), 1e-5);
  const auto lost = [&](const Transformer& model, Quantizer quantizer) {
    return distance(*quantize_calibrated(m.context, model, quantization, tokens,
                                         {.rule = GetParam().rule, .seq = kSeq, .by = quantizer})
                         .quantized.model);
  };
  const std::unique_ptr<Transformer> rotated = rotate_model(m.context, m.model);
  const double rtn = lost(m.model, Quantizer::RoundToNearest),
               quarot = lost(*rotated, Quantizer::RoundToNearest),
               quarot_gptq = lost(*rotated, Quantizer::Gptq);
  EXPECT_GT(rtn, 3 * quarot);
  EXPECT_GT(rtn, 3 * quarot_gptq);
  RecordProperty("rtn_over_quarot", fmt::format("{:.2f}", rtn / quarot));
  RecordProperty("rtn_over_quarot_gptq", fmt::format("{:.2f}", rtn / quarot_gptq));
}

TEST(MatchQuantile, MeetsTheShareBetweenTwoLogits) {
  const RefittedThreshold r = match_quantile({3, -1, 0.5, 2, -4}, 0.4, 0.5);
  EXPECT_EQ(r.share_unfitted, 0.6);
  EXPECT_EQ(r.share_after, 0.4);
  EXPECT_EQ(r.shift, -1.25);  // half way between 2 and 0.5
  const RefittedThreshold high = match_quantile({3, -1, 0.5, 2, -4}, 0.8, 0.75);
  EXPECT_NEAR(high.shift, std::log(3.0) + 2.5, 1e-12);
  EXPECT_EQ(high.share_after, 0.8);
  for (const double share : {0.0, 1.0}) EXPECT_EQ(match_quantile({1, 2}, share, 0.5).shift, 0);
  EXPECT_EQ(match_quantile({}, 0.5, 0.5).share_after, 0);
}

// Losses are the model's own, and decisions are those of the passes.
TEST_P(Calibrated, IsComparedWithWhatItWas) {
  const std::vector<std::int32_t> held = m.random_tokens(3 * kSeq + 4, 17);
  const ModelComparison same =
      compare_models(m.context, m.model, m.model, {GetParam().rule, GetParam().rule}, held, kSeq);
  EXPECT_EQ(same.tokens, 3 * kSeq);
  EXPECT_EQ(same.loss_before, same.loss_after);
  const CalibratedModel made = by(Quantizer::RoundToNearest);
  const ModelComparison compared = compare_models(m.context, m.model, *made.quantized.model,
                                                  {GetParam().rule, GetParam().rule}, held, kSeq);
  EXPECT_EQ(compared.loss_before, same.loss_before);
  EXPECT_NE(compared.loss_after, same.loss_after);
  DecisionCounts before, after;
  double loss = 0;
  const NoGrad no_grad(m.context);
  for (std::int64_t first = 0; first < same.tokens; first += kSeq) {
    const auto at = held.begin() + first;
    const Batch batch = make_batch(m.context, 1, kSeq, {at, at + kSeq}, {at + 1, at + kSeq + 1});
    const ForwardResult result = m.model.forward(m.context, batch, GetParam().rule);
    before.add(m.context, result);
    loss += m.model.objective(m.context, batch, result, 1).cross_entropy;
    after.add(m.context, made.quantized.model->forward(m.context, batch, GetParam().rule));
  }
  EXPECT_NEAR(compared.loss_before, loss / static_cast<double>(same.tokens), 1e-5);
  ASSERT_EQ(compared.decisions.size(), m.model.routed_layers().size() + m.model.expert_layers().size());
  double flipped = 0;
  for (std::size_t i = 0; i < compared.decisions.size(); ++i) {
    const ComparedDecisions& d = compared.decisions[i];
    EXPECT_EQ(same.decisions[i].flipped, 0);
    EXPECT_EQ(same.decisions[i].share_after, same.decisions[i].share_before);
    const auto taken = [&](const DecisionCounts& counts) {
      std::int64_t sum = d.of_experts ? 0 : counts.taken(d.layer);
      for (std::int64_t e = 0; d.of_experts && e < GetParam().routing.experts.count; ++e)
        sum += counts.taken(d.layer, e);
      return static_cast<double>(sum) /
             static_cast<double>(same.tokens * (d.of_experts ? GetParam().routing.experts.count : 1));
    };
    EXPECT_NEAR(d.share_before, taken(before), 1e-12);
    EXPECT_NEAR(d.share_after, taken(after), 1e-12);
    EXPECT_GE(d.flipped, std::abs(d.share_after - d.share_before) - 1e-12);
    EXPECT_LT(d.flipped, 0.3);
    flipped += d.flipped;
  }
  if (!compared.decisions.empty()) {
    EXPECT_GT(flipped, 0);
  }
  EXPECT_THROW(compare_models(m.context, m.model, m.model, {GetParam().rule, GetParam().rule},
                              std::span(held).first(kSeq), kSeq),
               InternalError);
}

INSTANTIATE_TEST_SUITE_P(Models, Calibrated, ::testing::ValuesIn(model_kinds()),
                         [](const auto& of_case) { return of_case.param.name; });

TEST(CalibrationSize, ReachesEveryLayerAndExpertOrTheCap) {
  SmallModel dense(DType::F32, small_config(), by(CausalMethod::None));
  const std::vector<std::int32_t> tokens = dense.random_tokens(8 * kSeq + 3, 5);
  const auto needed = [&](SmallModel& m, const SelectionRule& rule, const CalibrationGoal& goal) {
    return calibration_tokens_needed(m.context, m.model, rule, tokens, kSeq, goal);
  };
  EXPECT_EQ(needed(dense, TopK{}, {.layer = 9999, .expert = 9999, .most = 99999}), 8 * kSeq);
  // A quarter of each sequence: 64 of 256.
  SmallModel mod(DType::F32, small_config(), routed(CausalMethod::None));
  EXPECT_EQ(needed(mod, TopK{}, {.layer = 64, .expert = 9999, .most = 99999}), 8 * kSeq);
  EXPECT_EQ(needed(mod, TopK{}, {.layer = 65, .expert = 9999, .most = 99999}), 9 * kSeq);
  EXPECT_EQ(needed(mod, TopK{}, {.layer = 128, .expert = 9999, .most = 99999}), 16 * kSeq);
  EXPECT_EQ(needed(mod, TopK{}, {.layer = 9999, .expert = 1, .most = 20 * kSeq + 7}), 20 * kSeq);
  EXPECT_EQ(needed(mod, TopK{}, {.layer = 9999, .expert = 1, .most = 3}), 8 * kSeq);
  // A block that keeps nothing goes to the cap.
  for (const std::int64_t layer : mod.model.routed_layers())
    mod.context.backend().fill(
        mod.model.parameters().master(fmt::format("model.layers.{}.router.weight", layer)), 0.0);
  EXPECT_EQ(needed(mod, Causal{}, {.layer = 1, .expert = 1, .most = 100 * kSeq}), 100 * kSeq);
  // Three experts that take a third of each sequence, 10 or 11 of 32 (rounded down), each.
  SmallModel moe(DType::F32, small_config(), with_experts(by(CausalMethod::None), RoutingKind::Moe));
  const std::int64_t each = expert_tokens(moe.model.routing().experts, kSeq);
  EXPECT_EQ(needed(moe, TopK{}, {.layer = 9999, .expert = 12 * each, .most = 99999}), 12 * kSeq);
}

TEST(CalibratedOf, FewTokensAndNone) {
  SmallModel m(DType::F32, small_config(), by(CausalMethod::None));
  EXPECT_THROW(quantize_calibrated(m.context, m.model, {}, m.random_tokens(7, 1), {.seq = 8}), InternalError);
  std::vector<std::int64_t> seen;
  const CalibratedModel made =
      quantize_calibrated(m.context, m.model, {}, m.random_tokens(8, 1),
                          {.seq = 8, .progress = [&](std::int64_t done, std::int64_t blocks) {
                             EXPECT_EQ(blocks, 4);
                             seen.push_back(done);
                           }});
  EXPECT_THAT(seen, ::testing::ElementsAre(0, 1, 2, 3));
  for (const CalibratedMatrix& matrix : made.matrices) {
    EXPECT_TRUE(matrix.has_few_tokens());
    EXPECT_EQ(matrix.tokens, 8);
    EXPECT_EQ(matrix.by, Quantizer::Gptq);  // damped
  }
}

}  // namespace
}  // namespace fathom::model_test
