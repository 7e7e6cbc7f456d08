// Models whose keys become codes without the calibration's mean: which mean that is, that whoever attends
// takes off the same, and what it gains where keys share a vector.
#include "infer/quant/key_means.h"

#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "infer/engine.h"
#include "infer/generate.h"
#include "infer/quant/calibrate.h"
#include "kernels/error.h"
#include "tests/quant/model_kinds.h"
#include "tests/quant/round_to_nearest.h"

namespace fathom::model_test {
namespace {

using quant_test::round_to_nearest;
using ::testing::HasSubstr;

constexpr std::int64_t kSeq = 32;

ModelConfig config() {
  ModelConfig m = small_config();
  m.kv_heads = 2;
  m.qk_norm = true;
  return m;
}

Quantization codes(int bits, bool key_means = true, bool transforms = true) {
  return {.method = "rtn",
          .bits = 16,
          .kv = bits,
          .key_means = key_means,
          .kinds = {},
          .online = {.queries_keys = transforms}};
}

CalibratedModel calibrated(SmallModel& m, const Quantization& q, const SelectionRule& rule) {
  CalibrationOptions options;
  options.rule = rule;
  options.seq = kSeq;
  return quantize_calibrated(m.context, m.model, q, m.random_tokens(12 * kSeq, 3), options);
}

std::vector<double> logits(SmallModel& m, const Transformer& model, const SelectionRule& rule) {
  const NoGrad no_grad(m.context);
  const Batch batch = m.random_batch(6, kSeq, 91);
  return to_doubles(m.context.backend(),
                    model.logits(m.context, model.forward(m.context, batch, rule).hidden));
}

/// |a - b|
double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

class KeyMeansOf : public ::testing::TestWithParam<ModelKind> {};

// Of weights of few bits too, whose keys are not those of the weights before; by hand from what the block
// shows.
TEST_P(KeyMeansOf, AModelAreThoseOfItsOwnKeys) {
  for (Quantization q : {codes(4), codes(8, true, false)}) {
    SmallModel m(DType::F32, config(), GetParam().routing);
    if (q.kv == 8) q.bits = 4, q.kinds = Quantization{}.kinds;
    const CalibratedModel made = calibrated(m, q, GetParam().rule);
    const Transformer& model = *made.quantized.model;
    const NoGrad no_grad(m.context);
    const std::vector<std::int32_t> tokens = m.random_tokens(12 * kSeq, 3);
    const std::vector<Batch> batches = calibration_batches(m.context, tokens, kSeq);
    ASSERT_EQ(batches.size(), 1U);
    Tensor stream = model.embed(m.context, batches[0]);
    const auto row = static_cast<std::size_t>((config().heads + 2 * config().kv_heads) * config().head_dim());
    const auto first = static_cast<std::size_t>(config().heads * config().head_dim());
    for (std::int64_t layer = 0; layer < config().depth; ++layer) {
      SCOPED_TRACE(layer);
      std::vector<double> keys;
      std::int64_t times = 0;
      ForwardResult decided;
      stream = model.run_block(m.context, layer, stream, batches[0], GetParam().rule, decided, {},
                               [&](const Tensor& qkv) {
                                 keys = to_doubles(m.context.backend(), qkv);
                                 ++times;
                               });
      ASSERT_EQ(times, 1);
      const std::size_t rows = keys.size() / row;
      EXPECT_EQ(rows < tokens.size(), model.routing().routes(layer));
      const std::vector<double> means = to_doubles(m.context.backend(), model.key_means(layer));
      ASSERT_EQ(means.size(), static_cast<std::size_t>(config().kv_heads * config().head_dim()));
      double largest = 0;
      for (std::size_t e = 0; e < means.size(); ++e) {
        double sum = 0;
        for (std::size_t r = 0; r < rows; ++r) sum += keys[r * row + first + e];
        EXPECT_EQ(static_cast<float>(sum / static_cast<double>(rows)), static_cast<float>(means[e])) << e;
        largest = std::max(largest, std::fabs(means[e]));
      }
      EXPECT_GT(largest, 1e-3);
    }
  }
}

// In chunks, beside each other and one by one, to the bit: all that is attended to lost the same. The context
// is of the row-invariant mode.
void expect_decodes_as_the_whole_pass(SmallModel& m, const Transformer& model, const Causal& rule) {
  EngineOptions options;
  options.rule = rule;
  options.max_rows = 5;
  options.cache.bytes = 1 << 20;
  Engine engine(m.context, model, options);
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
  for (const auto& [id, all] : ids) {
    const std::vector<float> whole = causal_logits(m.context, model, all, rule);
    ASSERT_GE(seen.at(id).size(), 9U);
    for (const auto& [position, logits] : seen.at(id)) {
      const auto at = whole.begin() + static_cast<std::ptrdiff_t>((position - 1) * config().vocab_size);
      EXPECT_EQ(logits, std::vector<float>(at, at + static_cast<std::ptrdiff_t>(config().vocab_size)));
    }
  }
}

TEST_P(KeyMeansOf, AModelAreTakenOffByWhoeverAttends) {
  const bool is_dense = GetParam().name == "dense";  // any rule is causal there
  if (!is_dense && !std::holds_alternative<Causal>(GetParam().rule)) return;
  SmallModel m(DType::F32, config(), GetParam().routing, {.invariant = true});
  for (const int bits : {4, 8}) {
    const CalibratedModel made = calibrated(m, codes(bits), GetParam().rule);
    expect_decodes_as_the_whole_pass(m, *made.quantized.model,
                                     is_dense ? Causal{} : std::get<Causal>(GetParam().rule));
  }
}

class KeyMeansOn : public OnDevice<Device> {};

// Behind the first block codes of few bits differ where numbers do in their last bits.
TEST_P(KeyMeansOn, EveryDeviceAreTheSame) {
  for (const bool is_dense : {true, false}) {
    const RoutingConfig routing =
        is_dense ? by(CausalMethod::None) : routed(CausalMethod::Both, Gate::Sigmoid, 0.5);
    const Causal rule = is_dense ? Causal{} : Causal{Causal::Logit::Predictor, 0.5};
    SmallModel m(DType::F32, config(), routing, {.invariant = true}, device()),
        on_cpu(DType::F32, config(), routing);
    const CalibratedModel ours = calibrated(m, codes(4), rule), theirs = calibrated(on_cpu, codes(4), rule);
    const std::vector<double> a = to_doubles(m.context.backend(), ours.quantized.model->key_means(0)),
                              b = to_doubles(on_cpu.context.backend(), theirs.quantized.model->key_means(0));
    ASSERT_EQ(a.size(), b.size());
    for (std::size_t e = 0; e < a.size(); ++e) EXPECT_NEAR(a[e], b[e], 1e-5) << e;
    expect_decodes_as_the_whole_pass(m, *ours.quantized.model, rule);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, KeyMeansOn, ::testing::ValuesIn(testing_support::devices()), device_name);

// Numbers lose nothing: the model is what it is without means, to the bit.
TEST_P(KeyMeansOf, AModelChangeNothingOfNumbers) {
  SmallModel m(DType::F32, config(), GetParam().routing);
  CalibratedModel with = calibrated(m, codes(4), GetParam().rule),
                  without = calibrated(m, codes(4, false), GetParam().rule);
  EXPECT_FALSE(without.quantized.model->key_means(0).defined());
  EXPECT_NE(logits(m, *with.quantized.model, GetParam().rule),
            logits(m, *without.quantized.model, GetParam().rule));
  with.quantized.model->set_kv_bits(16);
  without.quantized.model->set_kv_bits(16);
  EXPECT_EQ(logits(m, *with.quantized.model, GetParam().rule),
            logits(m, *without.quantized.model, GetParam().rule));
}

INSTANTIATE_TEST_SUITE_P(Models, KeyMeansOf, ::testing::ValuesIn(model_kinds()),
                         [](const auto& of_kind) { return of_kind.param.name; });

/// One block whose keys share a vector some twenty times as large as what tells them apart: all embeddings
/// have a direction in common, which keys alone read. The base of positions turns but one pair of a head.
struct SharedKeys : SmallModel {
  SharedKeys() : SmallModel(DType::F32, shared_config(), by(CausalMethod::None)) {
    const double u = 1 / std::sqrt(32.0);  // each element of the direction
    change("model.embed_tokens.weight", [&](std::vector<double>& table) {
      for (double& x : table) x += u;
    });
    change("model.layers.0.input_layernorm.weight", [](std::vector<double>& norm) {
      for (double& x : norm) x = 1;
    });
    change("model.layers.0.self_attn.qkv_proj.weight", [&](std::vector<double>& w) {
      for (std::size_t row = 0; row < 96; ++row) {  // 32 of queries, of keys and of values
        double along = 0;
        for (std::size_t k = 0; k < 32; ++k) along += u * w[row * 32 + k];
        const double common = row / 32 == 1 ? 3.5 * std::cos(1.7 * static_cast<double>(row)) : 0;
        for (std::size_t k = 0; k < 32; ++k) {
          w[row * 32 + k] += (common - along) * u;
          if (row < 32) w[row * 32 + k] *= 3;
        }
      }
    });
  }

 private:
  static ModelConfig shared_config() {
    ModelConfig m = small_config();
    m.width = 32;
    m.depth = 1;
    m.heads = m.kv_heads = 2;
    m.rope_theta = 1e30;
    return m;
  }
  template <typename Change>
  void change(const std::string& name, const Change& by_what) {
    const Tensor& t = model.parameters().master(name);
    std::vector<double> values = to_doubles(context.backend(), t);
    by_what(values);
    from_doubles(context.backend(), t, values);
  }
};

TEST(KeyMeansOfAModel, GainWhereKeysShareAVector) {
  SharedKeys m;
  const SelectionRule rule = TopK{};
  const std::vector<double> exact = logits(m, m.model, rule);
  for (const bool transforms : {false, true}) {
    const CalibratedModel with = calibrated(m, codes(4, true, transforms), rule),
                          without = calibrated(m, codes(4, false, transforms), rule);
    // What values lose is in both.
    const double gained = distance(logits(m, *with.quantized.model, rule), exact),
                 lost = distance(logits(m, *without.quantized.model, rule), exact);
    EXPECT_LT(gained, 0.7 * lost);
  }
}

TEST(KeyMeansOfAModel, AreSumsInDoubleAndZerosWithoutAKey) {
  ModelConfig m = config();
  KeyMeans keys(m);
  for (const float x : keys.means()) EXPECT_EQ(x, 0);
  Context c(make_cpu_backend({}, 1), DType::F32);
  const std::int64_t d = m.head_dim(), row = (m.heads + 2 * m.kv_heads) * d;
  // In fp32 the ones would be lost beside 2^25.
  for (const double x : {0x1p25, 1.0, 1.0, -0x1p25}) {
    const Tensor rows = c.empty({1, row});
    from_doubles(c.backend(), rows, std::vector<double>(static_cast<std::size_t>(row), x));
    keys.add(c, rows);
  }
  EXPECT_EQ(keys.rows(), 4);
  EXPECT_EQ(keys.means(), std::vector<float>(static_cast<std::size_t>(m.kv_heads * d), 0.5F));
}

TEST(KeyMeansOfAModel, AreFiniteAndOfItsShape) {
  Context c(make_cpu_backend({}, 1), DType::F32);
  Transformer model(c, config(), {}, codes(4)), none(c, config(), {}, codes(4, false));
  std::vector<float> means(static_cast<std::size_t>(config().kv_heads * config().head_dim()), 1);
  model.set_key_means(c, 1, means);
  EXPECT_EQ(to_floats(c.backend(), model.key_means(1)), means);
  EXPECT_EQ(to_floats(c.backend(), model.key_means(0)), std::vector<float>(means.size(), 0));
  EXPECT_THROW(none.set_key_means(c, 1, means), InternalError);
  means.back() = std::numeric_limits<float>::infinity();
  try {
    model.set_key_means(c, 1, means);
    ADD_FAILURE() << "no error";
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr("layer 1's keys is not finite"));
  }
  means.pop_back();
  EXPECT_THROW(model.set_key_means(c, 1, means), InternalError);
}

}  // namespace
}  // namespace fathom::model_test
