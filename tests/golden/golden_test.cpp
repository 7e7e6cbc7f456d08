// Whole models against the PyTorch reference: activations, losses, every gradient, causal selection
// (README.md of this folder).
#include <optional>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "tests/devices.h"
#include "tests/golden/golden_model.h"

namespace fathom::golden {
namespace {

using testing_support::Device;

struct Case {
  std::string name;
  DType dtype;
  Device device;
  std::string str() const { return name + "_" + name_of(dtype) + (device == Device::Cuda ? "_cuda" : ""); }
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.str(); }
};

class Golden : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    const testing_support::OpenedDevice opened = testing_support::open_device(GetParam().device);
    testing_support::skip_without(opened);
    if (!opened.backend) return;
    context_.emplace(opened.backend, GetParam().dtype);
    model_.emplace(*context_, model_config(file_, kSeq), routing_config(file_), true);
    load_parameters(*context_, *model_);
    const GoldenFile shared("shared.h5");
    batch_ = make_batch(*context_, kBatch, kSeq, shared.ints("tokens"), shared.ints("targets"));
  }

  // The files hold fp64 results rounded to fp32, so fp64 cannot agree to better than 6e-8.
  double tolerance() const {
    if (GetParam().dtype == DType::F64) return 1e-7;
    return GetParam().device == Device::Cpu ? 1e-5 : 2e-5;  // the GPU's exponentials are shorter
  }

  std::vector<double> host(const Tensor& t) { return to_doubles(context_->backend(), t); }

  void agree(const std::string& what, const std::vector<double>& ours) {
    const double error = relative_error(ours, file_.doubles(what));
    EXPECT_LE(error, tolerance()) << what;
    if (error > worst_) worst_ = error, worst_name_ = what;
  }

  void agree_on_rows(const std::string& what, const Tensor& indices) {
    EXPECT_EQ(to_host<std::int32_t>(context_->backend(), indices), file_.ints(what)) << what;
  }

  void TearDown() override {
    if (worst_name_.empty()) return;
    RecordProperty("worst_relative_error", fmt::format("{:.2e} ({})", worst_, worst_name_));
    fmt::print("worst relative error {:.2e}: {}\n", worst_, worst_name_);
  }

  GoldenFile file_{GetParam().name + ".h5"};
  std::optional<Context> context_;
  std::optional<Transformer> model_;
  Batch batch_;
  double worst_ = 0;
  std::string worst_name_;
};

TEST_P(Golden, ActivationsAndSelection) {
  const auto observe = [this](std::int64_t blocks, const Tensor& stream) {
    agree(fmt::format("stream/{}", blocks), host(stream));
  };
  const ForwardResult result = model_->forward(*context_, batch_, TopK{}, observe);
  agree("hidden", host(result.hidden));
  agree("logits", host(model_->logits(*context_, result.hidden)));
  EXPECT_EQ(result.routing.size(), file_.has("scores") ? file_.names("scores").size() : 0);
  for (const RoutedLayer& routed : result.routing) {
    agree(fmt::format("scores/{}", routed.layer), host(routed.scores));
    agree_on_rows(fmt::format("indices/{}", routed.layer), routed.indices);
    const std::string predicted = fmt::format("predicted/{}", routed.layer);
    ASSERT_EQ(routed.predicted.defined(), file_.has(predicted));
    if (routed.predicted.defined()) agree(predicted, host(routed.predicted));
  }
  EXPECT_EQ(result.experts.size(), file_.has("experts/rows") ? file_.names("experts/rows").size() : 0);
  for (const ExpertLayer& experts : result.experts) {
    agree(fmt::format("experts/affinity/{}", experts.layer), host(experts.affinity));
    agree_on_rows(fmt::format("experts/rows/{}", experts.layer), experts.dispatch.rows);
    if (!file_.has_attribute("foretold")) continue;
    agree_on_rows(fmt::format("experts/chosen/{}", experts.layer), experts.dispatch.chosen);
    if (model_->routing().has_aux_loss())
      agree(fmt::format("experts/scores/{}", experts.layer), host(experts.scores));
    const std::string predicted = fmt::format("experts/predicted/{}", experts.layer);
    ASSERT_EQ(experts.predicted.defined(), file_.has(predicted));
    if (experts.predicted.defined()) agree(predicted, host(experts.predicted));
  }
}

TEST_P(Golden, LossesAndEveryGradient) {
  Tape tape(*context_);
  context_->set_tape(&tape);
  const ForwardResult result = model_->forward(*context_, batch_, TopK{});
  const LossSums sums = model_->objective(*context_, batch_, result, 1.0);
  context_->set_tape(nullptr);
  tape.backward();

  const auto rows = static_cast<double>(kBatch * kSeq);
  const double scalar = GetParam().dtype == DType::F64     ? 1e-12
                        : GetParam().device == Device::Cpu ? 1e-6
                                                           : 2e-6;
  const auto close = [&](const char* what, double ours) {
    const double theirs = file_.number(std::string("loss/") + what);
    EXPECT_NEAR(ours, theirs, scalar * std::abs(theirs)) << what;
  };
  const RoutingConfig& routing = model_->routing();
  close("cross_entropy", sums.cross_entropy / rows);
  if (routing.has_aux_loss()) close("aux", sums.aux / rows);
  if (routing.has_predictor()) close("predictor", sums.predictor / rows);
  double objective = sums.cross_entropy + routing.causal.aux_weight * (sums.aux + sums.expert_aux) +
                     sums.predictor + sums.expert_predictor;
  if (file_.has_attribute("foretold")) {
    if (routing.has_aux_loss()) close("expert_aux", sums.expert_aux / rows);
    if (routing.has_predictor()) close("expert_predictor", sums.expert_predictor / rows);
  }
  if (routing.tokens_choose()) {
    close("balance", sums.balance / rows);
    close("z", sums.z / rows);
    objective += routing.experts.balance_weight * sums.balance + routing.experts.z_weight * sums.z;
  }
  close("objective", objective / rows);

  EXPECT_EQ(file_.names("gradient").size(), model_->parameters().specs().size());
  for (const ParameterSpec& spec : model_->parameters().specs()) {
    agree("gradient/" + spec.name, host(model_->parameters().get(spec.name).bound_gradient()));
  }
}

// Of the models that the reference has a causal rule for.
class GoldenCausal : public Golden {};

// The reference computes every token and masks; Fathom gathers the chosen ones, as many as each sequence has.
TEST_P(GoldenCausal, Selection) {
  if (model_->routing().needs_future()) {  // there is no rule
    EXPECT_THROW(causal_rule(model_->routing()), UserError);
    return;
  }
  const ForwardResult result = model_->forward(*context_, batch_, causal_rule(model_->routing()));
  if (!model_->routing().looks_ahead()) {  // nothing chooses: the rule must change nothing
    EXPECT_TRUE(result.routing.empty());
    agree("logits", host(model_->logits(*context_, result.hidden)));
    return;
  }
  for (const RoutedLayer& routed : result.routing) {
    agree_on_rows(fmt::format("causal/indices/{}", routed.layer), routed.indices);
  }
  for (const ExpertLayer& experts : result.experts) {
    agree_on_rows(fmt::format("causal/chosen/{}", experts.layer), experts.dispatch.chosen);
  }
  agree("causal/logits", host(model_->logits(*context_, result.hidden)));
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* name : kModels) {
    for (DType dtype : {DType::F32, DType::F64}) all.push_back({name, dtype, Device::Cpu});
  }
  for (const char* name : kModels) {
    if (testing_support::devices().back() == Device::Cuda) all.push_back({name, DType::F32, Device::Cuda});
  }
  return all;
}

// Models whose tokens choose their experts come from a reference of their own, which has no causal rule.
std::vector<Case> causal_cases() {
  std::vector<Case> all = cases();
  std::erase_if(all, [](const Case& c) { return c.name.starts_with("token_"); });
  return all;
}

INSTANTIATE_TEST_SUITE_P(Models, Golden, ::testing::ValuesIn(cases()),
                         [](const auto& p) { return p.param.str(); });
INSTANTIATE_TEST_SUITE_P(Models, GoldenCausal, ::testing::ValuesIn(causal_cases()),
                         [](const auto& p) { return p.param.str(); });

}  // namespace
}  // namespace fathom::golden
