// Whole models against the PyTorch reference: activations, losses, every gradient, causal selection
// (README.md of this folder).
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/golden/golden_model.h"

namespace fathom::golden {
namespace {

struct Case {
  std::string name;
  DType dtype;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name << ", " << name_of(c.dtype); }
};

class Golden : public ::testing::TestWithParam<Case> {
 protected:
  Golden()
      : file_(GetParam().name + ".h5"),
        context_(make_cpu_backend({}), GetParam().dtype),
        model_(context_, model_config(file_, kSeq), routing_config(file_), true) {
    load_parameters(context_, model_);
    const GoldenFile shared("shared.h5");
    batch_ = make_batch(context_, kBatch, kSeq, shared.ints("tokens"), shared.ints("targets"));
  }

  // The files hold fp64 results rounded to fp32, so fp64 cannot agree to better than 6e-8.
  double tolerance() const { return GetParam().dtype == DType::F64 ? 1e-7 : 1e-5; }

  std::vector<double> host(const Tensor& t) { return to_doubles(context_.backend(), t); }

  void agree(const std::string& what, const std::vector<double>& ours) {
    const double error = relative_error(ours, file_.doubles(what));
    EXPECT_LE(error, tolerance()) << what;
    if (error > worst_) worst_ = error, worst_name_ = what;
  }

  void agree_on_rows(const std::string& what, const Tensor& indices) {
    EXPECT_EQ(to_host<std::int32_t>(context_.backend(), indices), file_.ints(what)) << what;
  }

  void TearDown() override {
    if (worst_name_.empty()) return;
    RecordProperty("worst_relative_error", fmt::format("{:.2e} ({})", worst_, worst_name_));
    fmt::print("worst relative error {:.2e}: {}\n", worst_, worst_name_);
  }

  GoldenFile file_;
  Context context_;
  Transformer model_;
  Batch batch_;
  double worst_ = 0;
  std::string worst_name_;
};

TEST_P(Golden, ActivationsAndSelection) {
  const auto observe = [this](std::int64_t blocks, const Tensor& stream) {
    agree(fmt::format("stream/{}", blocks), host(stream));
  };
  const ForwardResult result = model_.forward(context_, batch_, TopK{}, observe);
  agree("hidden", host(result.hidden));
  agree("logits", host(model_.logits(context_, result.hidden)));
  EXPECT_EQ(result.routing.size(), file_.has("scores") ? file_.names("scores").size() : 0);
  for (const RoutedLayer& routed : result.routing) {
    agree(fmt::format("scores/{}", routed.layer), host(routed.scores));
    agree_on_rows(fmt::format("indices/{}", routed.layer), routed.indices);
    const std::string predicted = fmt::format("predicted/{}", routed.layer);
    ASSERT_EQ(routed.predicted.defined(), file_.has(predicted));
    if (routed.predicted.defined()) agree(predicted, host(routed.predicted));
  }
}

TEST_P(Golden, LossesAndEveryGradient) {
  Tape tape(context_);
  context_.set_tape(&tape);
  const ForwardResult result = model_.forward(context_, batch_, TopK{});
  const LossSums sums = model_.objective(context_, batch_, result, 1.0);
  context_.set_tape(nullptr);
  tape.backward();

  const auto rows = static_cast<double>(kBatch * kSeq);
  const double scalar = GetParam().dtype == DType::F64 ? 1e-12 : 1e-6;
  const auto close = [&](const char* what, double ours) {
    const double theirs = file_.number(std::string("loss/") + what);
    EXPECT_NEAR(ours, theirs, scalar * std::abs(theirs)) << what;
  };
  const RoutingConfig& routing = model_.routing();
  close("cross_entropy", sums.cross_entropy / rows);
  if (routing.has_aux_loss()) close("aux", sums.aux / rows);
  if (routing.has_predictor()) close("predictor", sums.predictor / rows);
  close("objective", (sums.cross_entropy + routing.causal.aux_weight * sums.aux + sums.predictor) / rows);

  EXPECT_EQ(file_.names("gradient").size(), model_.parameters().specs().size());
  for (const ParameterSpec& spec : model_.parameters().specs()) {
    agree("gradient/" + spec.name, host(model_.parameters().get(spec.name).bound_gradient()));
  }
}

// The reference computes every token and masks; Fathom gathers the chosen ones, as many as each sequence has.
TEST_P(Golden, CausalSelection) {
  const ForwardResult result = model_.forward(context_, batch_, causal_rule(model_.routing()));
  if (model_.routed_layers().empty()) {  // nothing chooses: the rule must change nothing
    EXPECT_TRUE(result.routing.empty());
    agree("logits", host(model_.logits(context_, result.hidden)));
    return;
  }
  for (const RoutedLayer& routed : result.routing) {
    agree_on_rows(fmt::format("causal/indices/{}", routed.layer), routed.indices);
  }
  agree("causal/logits", host(model_.logits(context_, result.hidden)));
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* name : {"dense", "dense_gqa", "dense_tied", "mod_raw_aux", "mod_sigmoid_aux",
                           "mod_tanh_aux", "mod_raw_predictor", "mod_sigmoid_both", "mod_raw_both_gqa"}) {
    for (DType dtype : {DType::F32, DType::F64}) all.push_back({name, dtype});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Models, Golden, ::testing::ValuesIn(cases()),
                         [](const auto& p) { return p.param.name + "_" + name_of(p.param.dtype); });

}  // namespace
}  // namespace fathom::golden
