// Two ways to compute one thing have to agree, most of them to the last bit.
#include <gtest/gtest.h>

#include "tests/model/small_model.h"
#include "train/optimizer.h"

namespace fathom::model_test {
namespace {

constexpr std::int64_t kSeq = 16;

void expect_equal(const Snapshot& a, const Snapshot& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, values] : a) EXPECT_EQ(values, b.at(name)) << name;
}

void expect_close(const Snapshot& a, const Snapshot& b, double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, values] : a) EXPECT_LT(relative_difference(values, b.at(name)), tolerance) << name;
}

// --- capacity 1 with a gate of 1 is the dense model ---

struct GateCase {
  Gate gate;
  Device device;
  std::string str() const {
    return std::string(gate == Gate::Sigmoid ? "sigmoid_" : "tanh_") + testing_support::name_of(device);
  }
  friend void PrintTo(const GateCase& c, std::ostream* out) { *out << c.str(); }
};

class UnitGate : public OnDevice<GateCase> {};

TEST_P(UnitGate, CapacityOneIsTheDenseModel) {
  const DType dtype = device() == Device::Cpu ? DType::F64 : DType::F32;
  const double tolerance = device() == Device::Cpu ? 1e-12 : 2e-5;
  SmallModel dense(dtype, small_config(), RoutingConfig{}, {}, device());
  SmallModel mod(dtype, small_config(), routed(CausalMethod::None, GetParam().gate, 1.0), {}, device());
  // Column 0 of the stream is made large and positive, and the router reads only that column: its scores are
  // in the thousands, where a sigmoid and a tanh are exactly 1.
  for (SmallModel* m : {&dense, &mod}) {
    const Tensor& table = m->model.parameters().get("model.embed_tokens.weight");
    std::vector<double> values = m->host(table);
    for (std::size_t i = 0; i < values.size(); i += static_cast<std::size_t>(table.dim(1))) values[i] = 30.0;
    from_doubles(m->context.backend(), table, values);
  }
  std::vector<double> router(static_cast<std::size_t>(mod.model.config().width), 0.0);
  router[0] = 100.0;
  const std::vector<std::string> routers = {"model.layers.1.router.weight", "model.layers.3.router.weight"};
  for (const std::string& name : routers) {
    from_doubles(mod.context.backend(), mod.model.parameters().get(name), router);
  }

  const Batch dense_batch = dense.random_batch(2, kSeq, 3);
  const Batch mod_batch = mod.random_batch(2, kSeq, 3);
  for (const RoutedLayer& layer : mod.model.forward(mod.context, mod_batch, TopK{}).routing) {
    for (double r : mod.host(layer.scores)) ASSERT_GT(r, 1000.0);
  }
  const LossSums a = dense.backward(dense_batch, TopK{});
  const LossSums b = mod.backward(mod_batch, TopK{});
  EXPECT_NEAR(a.cross_entropy, b.cross_entropy, tolerance * a.cross_entropy);
  Snapshot routed_gradients = mod.gradients();
  for (const std::string& name : routers) routed_gradients.erase(name);
  expect_close(routed_gradients, dense.gradients(), tolerance);
}

std::vector<GateCase> gate_cases() {
  std::vector<GateCase> all;
  for (const Device device : testing_support::devices()) {
    for (const Gate gate : {Gate::Sigmoid, Gate::Tanh}) all.push_back({gate, device});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Gates, UnitGate, ::testing::ValuesIn(gate_cases()),
                         [](const auto& p) { return p.param.str(); });

// --- a threshold that nobody passes skips the block ---

class NobodyKept : public OnDevice<Device> {};

TEST_P(NobodyKept, TheBlockIsSkipped) {
  for (const Recompute recompute : {Recompute::None, Recompute::Block}) {
    SmallModel m(device() == Device::Cpu ? DType::F64 : DType::F32, small_config(),
                 routed(CausalMethod::Both), {}, device());
    m.model.set_recompute(recompute);
    const Batch batch = m.random_batch(2, kSeq, 3);
    const Causal nobody{Causal::Logit::Predictor, 1.0 - 1e-9};
    std::vector<std::vector<double>> streams;
    const ForwardResult result = m.model.forward(
        m.context, batch, nobody, [&](std::int64_t, const Tensor& x) { streams.push_back(m.host(x)); });
    EXPECT_EQ(result.routing.at(0).indices.size(), 0);
    ASSERT_EQ(streams.size(), 5U);
    EXPECT_EQ(streams[2], streams[1]);
    EXPECT_NE(streams[3], streams[2]);
    EXPECT_EQ(streams[4], streams[3]);

    m.backward(batch, nobody);
    for (const auto& [name, gradient] : m.gradients()) {
      const bool in_routed =
          name.find("layers.1.") != std::string::npos || name.find("layers.3.") != std::string::npos;
      const bool skipped = in_routed && name.find("router") == std::string::npos;
      EXPECT_EQ(std::all_of(gradient.begin(), gradient.end(), [](double g) { return g == 0; }), skipped)
          << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, NobodyKept, ::testing::ValuesIn(testing_support::devices()), device_name);

// --- recomputation ---

struct Variant {
  std::string name;
  DType dtype;
  RoutingConfig routing;
  std::vector<std::int32_t> documents;
  Device device = Device::Cpu;
  std::string str() const { return name + "_" + name_of(dtype) + (device == Device::Cuda ? "_cuda" : ""); }
  friend void PrintTo(const Variant& v, std::ostream* out) { *out << v.str(); }
};

std::vector<Variant> variants() {
  std::vector<std::int32_t> documents(2 * kSeq, 0);
  for (std::size_t i = 5; i < documents.size(); ++i) documents[i] = i < 20 ? 1 : 2;
  std::vector<Variant> all;
  const auto add = [&](DType dtype, Device device) {
    all.push_back({"dense", dtype, {}, {}, device});
    all.push_back({"dense_documents", dtype, {}, documents, device});
    all.push_back({"aux", dtype, routed(CausalMethod::Aux), {}, device});
    all.push_back({"both", dtype, routed(CausalMethod::Both, Gate::Tanh), {}, device});
    all.push_back({"both_documents", dtype, routed(CausalMethod::Both, Gate::Sigmoid), documents, device});
    all.push_back(
        {"moe_documents", dtype, with_experts(by(CausalMethod::Aux), RoutingKind::Moe), documents, device});
    all.push_back({"mode_integrated",
                   dtype,
                   with_experts(by(CausalMethod::Aux), RoutingKind::ModeIntegrated),
                   {},
                   device});
    all.push_back(
        {"token_top2", dtype, tokens_choose({}, RoutingKind::ModeIntegrated, 2, 0.8), documents, device});
    all.push_back(
        {"token_staged",
         dtype,
         tokens_choose(routed(CausalMethod::Both, Gate::Tanh, 0.5), RoutingKind::ModeStaged, 1, 1.0),
         {},
         device});
    all.push_back({"mode_staged",
                   dtype,
                   with_experts(routed(CausalMethod::Both, Gate::Sigmoid, 0.5), RoutingKind::ModeStaged),
                   {},
                   device});
  };
  for (DType dtype : {DType::F32, DType::F64}) add(dtype, Device::Cpu);
  if (testing_support::devices().back() == Device::Cuda) {
    for (DType dtype : {DType::F32, DType::BF16}) add(dtype, Device::Cuda);
  }
  return all;
}

class Recomputation : public OnDevice<Variant> {};

TEST_P(Recomputation, IsBitEqual) {
  const Variant& v = GetParam();
  const BackendOptions deterministic{.deterministic = true};
  SmallModel plain(v.dtype, small_config(), v.routing, deterministic, v.device);
  SmallModel again(v.dtype, small_config(), v.routing, deterministic, v.device);
  again.model.set_recompute(Recompute::Block);
  const LossSums a = plain.backward(plain.random_batch(2, kSeq, 3, v.documents), TopK{});
  const LossSums b = again.backward(again.random_batch(2, kSeq, 3, v.documents), TopK{});
  EXPECT_EQ(a.cross_entropy, b.cross_entropy);
  EXPECT_EQ(a.aux, b.aux);
  EXPECT_EQ(a.predictor, b.predictor);
  EXPECT_EQ(a.balance, b.balance);
  EXPECT_EQ(a.z, b.z);
  expect_equal(plain.gradients(), again.gradients());
}

INSTANTIATE_TEST_SUITE_P(Models, Recomputation, ::testing::ValuesIn(variants()),
                         [](const auto& p) { return p.param.str(); });

// --- gradients that begin anew forget what was ---

class BeginAnew : public OnDevice<Variant> {};

TEST_P(BeginAnew, IsZeroingFirst) {
  const Variant& v = GetParam();
  const BackendOptions deterministic{.deterministic = true};
  SmallModel zeroed(v.dtype, small_config(), v.routing, deterministic, v.device);
  SmallModel begun(v.dtype, small_config(), v.routing, deterministic, v.device);
  const auto two_parts = [&](SmallModel& m) {
    for (const unsigned seed : {3U, 5U}) {
      m.backward(m.random_batch(2, kSeq, seed, v.documents), TopK{}, 0.5);
    }
  };
  zeroed.backward(zeroed.random_batch(2, kSeq, 9, v.documents),
                  TopK{});  // the same choices of a library's kernel
  zeroed.zero_gradients();
  two_parts(zeroed);
  begun.backward(begun.random_batch(2, kSeq, 9, v.documents), TopK{});
  begin_gradients(begun.context, begun.model.parameters());
  two_parts(begun);
  settle_gradients(begun.context, begun.model.parameters());
  // An overwriting product and an adding one may differ in a library's rounding.
  const bool exact = v.device == Device::Cpu;
  const auto a = zeroed.gradients(), b = begun.gradients();
  exact ? expect_equal(a, b) : expect_close(a, b, v.dtype == DType::BF16 ? 1e-5 : 1e-6);
}

// What nothing reached is zero, not what it was.
TEST(BeginAnewAlone, SettlesWhatNothingReached) {
  SmallModel m(DType::F64, small_config(), {});
  m.context.backend().fill(m.model.parameters().gradients(), 7.0);
  begin_gradients(m.context, m.model.parameters());
  settle_gradients(m.context, m.model.parameters());
  for (const auto& [name, values] : m.gradients()) {
    for (const double g : values) ASSERT_EQ(g, 0.0) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, BeginAnew, ::testing::ValuesIn(variants()),
                         [](const auto& p) { return p.param.str(); });

// --- gradient accumulation ---

// Of each way to decide causally, on the CPU in double.
std::vector<Variant> routings() {
  return {{"dense", DType::F64, {}, {}},
          {"aux", DType::F64, routed(CausalMethod::Aux), {}},
          {"both", DType::F64, routed(CausalMethod::Both), {}}};
}

// Of those, and of experts, who choose within a sequence.
std::vector<Variant> accumulated() {
  std::vector<Variant> all = routings();
  all.push_back(
      {"mode_integrated", DType::F64, with_experts(by(CausalMethod::Aux), RoutingKind::ModeIntegrated), {}});
  all.push_back({"token_top2", DType::F64, tokens_choose({}, RoutingKind::Moe, 2, 0.8), {}});
  all.push_back({"mode_staged",
                 DType::F64,
                 with_experts(routed(CausalMethod::Both, Gate::Raw, 0.5), RoutingKind::ModeStaged),
                 {}});
  return all;
}

class Accumulation : public OnDevice<Variant> {};

TEST_P(Accumulation, TwoMicroBatchesAreOneBatch) {
  SmallModel whole(DType::F64, small_config(), GetParam().routing);
  SmallModel parts(DType::F64, small_config(), GetParam().routing);
  const std::vector<std::int32_t> tokens = whole.random_tokens(4 * kSeq, 3);
  const std::vector<std::int32_t> targets = whole.random_tokens(4 * kSeq, 4);
  const LossSums all = whole.backward(make_batch(whole.context, 4, kSeq, tokens, targets), TopK{});
  double cross_entropy = 0;
  for (const std::ptrdiff_t begin : {std::ptrdiff_t{0}, std::ptrdiff_t{2 * kSeq}}) {
    const auto half = [begin](const std::vector<std::int32_t>& v) {
      return std::vector<std::int32_t>(v.begin() + begin, v.begin() + begin + 2 * kSeq);
    };
    cross_entropy +=
        parts.backward(make_batch(parts.context, 2, kSeq, half(tokens), half(targets)), TopK{}, 0.5)
            .cross_entropy;
  }
  EXPECT_NEAR(cross_entropy, all.cross_entropy, 1e-12 * all.cross_entropy);
  expect_close(parts.gradients(), whole.gradients(), 1e-12);
}

INSTANTIATE_TEST_SUITE_P(Models, Accumulation, ::testing::ValuesIn(accumulated()),
                         [](const auto& p) { return p.param.name; });

// --- document masks ---

class Documents : public OnDevice<Variant> {};

// Top-k is left out: it chooses among the documents of a sequence. A threshold decides for each token alone.
TEST_P(Documents, AreEachAsIfAlone) {
  const RoutingConfig& routing = GetParam().routing;
  SmallModel m(DType::F64, small_config(), routing);
  const SelectionRule rule = routing.kind == RoutingKind::None ? SelectionRule(TopK{}) : causal_rule(routing);
  const std::vector<std::int64_t> lengths = {5, 1, 7, 3};  // 5 + 1 + 7 + 3 = 16, in each of two sequences
  const std::vector<std::int32_t> tokens = m.random_tokens(2 * kSeq, 3);
  const std::vector<std::int32_t> targets = m.random_tokens(2 * kSeq, 4);
  std::vector<std::int32_t> documents;
  for (int sequence = 0; sequence < 2; ++sequence) {
    for (std::size_t d = 0; d < lengths.size(); ++d) {
      documents.insert(documents.end(), static_cast<std::size_t>(lengths[d]), static_cast<std::int32_t>(d));
    }
  }
  const auto losses = [&](const Batch& batch) {
    const ForwardResult result = m.model.forward(m.context, batch, rule);
    return m.host(m.model.cross_entropy(m.context, result.hidden, batch.targets, 1.0));
  };
  const std::vector<double> packed = losses(make_batch(m.context, 2, kSeq, tokens, targets, documents));
  const std::vector<double> unmasked = losses(make_batch(m.context, 2, kSeq, tokens, targets));
  std::vector<double> alone;
  for (std::int64_t begin = 0; begin < 2 * kSeq;) {
    for (const std::int64_t length : lengths) {
      const auto part = [&](const std::vector<std::int32_t>& v) {
        return std::vector<std::int32_t>(v.begin() + begin, v.begin() + begin + length);
      };
      // RoPE sees differences of positions only, so a document may start at position 0 here.
      const std::vector<double> own = losses(make_batch(m.context, 1, length, part(tokens), part(targets)));
      alone.insert(alone.end(), own.begin(), own.end());
      begin += length;
    }
  }
  EXPECT_LT(relative_difference(packed, alone), 1e-12);
  EXPECT_GT(relative_difference(unmasked, alone), 1e-3) << "the mask has to matter for this to mean anything";
}

// Of those, and of tokens that choose experts, each for itself.
std::vector<Variant> served() {
  std::vector<Variant> all = routings();
  all.push_back({"token_top2", DType::F64, tokens_choose({}, RoutingKind::ModeIntegrated, 2), {}});
  all.push_back({"token_staged",
                 DType::F64,
                 tokens_choose(routed(CausalMethod::Both, Gate::Tanh, 0.5), RoutingKind::ModeStaged, 1),
                 {}});
  return all;
}

INSTANTIATE_TEST_SUITE_P(Models, Documents, ::testing::ValuesIn(served()),
                         [](const auto& p) { return p.param.name; });

// --- predictors shape nothing but themselves ---

class Predictors : public OnDevice<Device> {};

TEST_P(Predictors, LeaveTheModelBitEqual) {
  const BackendOptions deterministic{.deterministic = true};
  for (const auto& [without, with] : {std::pair{CausalMethod::None, CausalMethod::Predictor},
                                      std::pair{CausalMethod::Aux, CausalMethod::Both}}) {
    SmallModel a(DType::F32, small_config(), routed(without), deterministic, device());
    SmallModel b(DType::F32, small_config(), routed(with), deterministic, device());
    TrainConfig config;
    config.grad_clip = 0.1;  // always clips
    AdamW adam_a(a.context, a.model.parameters(), config);
    AdamW adam_b(b.context, b.model.parameters(), config);
    for (std::int64_t step = 1; step <= 5; ++step) {
      const auto seed = static_cast<unsigned>(10 * step);
      for (auto [m, adam] : {std::pair{&a, &adam_a}, std::pair{&b, &adam_b}}) {
        m->zero_gradients();
        m->backward(m->random_batch(2, kSeq, seed), TopK{});
        adam->update(m->context, m->model.parameters(), AdamW::norms(m->context, m->model.parameters()), 1e-3,
                     step);
      }
      const auto without_predictors = [](Snapshot s) {
        std::erase_if(
            s, [](const auto& item) { return item.first.find("router_predictor") != std::string::npos; });
        return s;
      };
      expect_equal(a.gradients(), without_predictors(b.gradients()));
      expect_equal(a.values(), without_predictors(b.values()));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, Predictors, ::testing::ValuesIn(testing_support::devices()), device_name);

}  // namespace
}  // namespace fathom::model_test
