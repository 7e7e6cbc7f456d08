// The golden models in bf16 on the GPU: losses and gradients as near to PyTorch's in fp64 as 8 bits allow.
#include <algorithm>
#include <span>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/devices.h"
#include "tests/golden/golden_model.h"

namespace fathom::golden {
namespace {

constexpr double kLossTolerance = 1e-2;
constexpr double kGradientTolerance = 5e-2;  // of the Frobenius norm

/// |ours - theirs| / |theirs|, Frobenius norms.
double relative_norm(const std::vector<double>& ours, const std::vector<double>& theirs) {
  if (ours.size() != theirs.size()) return INFINITY;
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    difference += (ours[i] - theirs[i]) * (ours[i] - theirs[i]);
    norm += theirs[i] * theirs[i];
  }
  if (!(difference < INFINITY)) return INFINITY;
  return std::sqrt(difference / (norm > 0 ? norm : 1));
}

/// How many of `ours` are not among `theirs`; -1 is an empty slot.
std::size_t missing(std::span<const std::int32_t> ours, std::span<const std::int32_t> theirs) {
  std::size_t count = 0;
  for (std::int32_t i : ours) count += i >= 0 && std::ranges::find(theirs, i) == theirs.end() ? 1 : 0;
  return count;
}

class GoldenBf16 : public testing_support::OnCuda<::testing::TestWithParam<const char*>> {};

TEST_P(GoldenBf16, LossesAndGradients) {
  const GoldenFile file(GetParam() + std::string(".h5"));
  const GoldenFile shared("shared.h5");
  Context c(shared_cuda(), DType::BF16);
  Transformer model(c, model_config(file, kSeq), routing_config(file), true);
  load_parameters(c, model);
  const Batch batch = make_batch(c, kBatch, kSeq, shared.ints("tokens"), shared.ints("targets"));
  Tape tape(c);
  LossSums sums;
  ForwardResult result;
  {
    const Recording recording(c, tape);
    result = model.forward(c, batch, TopK{});
    sums = model.objective(c, batch, result, 1.0);
  }
  tape.backward();

  // Rounding may swap two tokens at the edge of the top K, or two choices of experts: then the gradient is
  // that of another function.
  std::size_t swapped = 0;
  std::size_t choices = 0;
  for (const RoutedLayer& routed : result.routing) {
    const std::vector<std::int32_t> ours = to_host<std::int32_t>(c.backend(), routed.indices);
    const std::vector<std::int32_t> theirs = file.ints(fmt::format("indices/{}", routed.layer));
    ASSERT_EQ(ours.size(), theirs.size());
    swapped += missing(ours, theirs);
  }
  for (const ExpertLayer& experts : result.experts) {
    const std::vector<std::int32_t> ours = to_host<std::int32_t>(c.backend(), experts.dispatch.rows);
    const std::vector<std::int32_t> theirs = file.ints(fmt::format("experts/rows/{}", experts.layer));
    ASSERT_EQ(ours.size(), theirs.size());
    const std::size_t slots = ours.size() / static_cast<std::size_t>(model.routing().experts.count);
    for (std::size_t e = 0; e < ours.size(); e += slots) {
      swapped += missing(std::span(ours).subspan(e, slots), std::span(theirs).subspan(e, slots));
    }
    choices += ours.size();
  }
  EXPECT_LE(swapped, 2 + choices / 25);

  const auto rows = static_cast<double>(kBatch * kSeq);
  const auto close = [&](const char* what, double ours) {
    const double theirs = file.number(std::string("loss/") + what);
    EXPECT_NEAR(ours, theirs, (swapped == 0 ? 1 : 5) * kLossTolerance * std::abs(theirs)) << what;
  };
  close("cross_entropy", sums.cross_entropy / rows);
  if (model.routing().has_aux_loss()) close("aux", sums.aux / rows);
  if (model.routing().has_predictor()) close("predictor", sums.predictor / rows);
  if (swapped > 0) {
    fmt::print("{} choices fell differently: gradients not compared\n", swapped);
    return;
  }
  double worst = 0;
  std::string worst_name;
  for (const ParameterSpec& spec : model.parameters().specs()) {
    const double error =
        relative_norm(to_doubles(c.backend(), model.parameters().get(spec.name).bound_gradient()),
                      file.doubles("gradient/" + spec.name));
    EXPECT_LE(error, kGradientTolerance) << spec.name;
    if (error > worst) worst = error, worst_name = spec.name;
  }
  fmt::print("worst relative error of a gradient {:.2e}: {}\n", worst, worst_name);
}

INSTANTIATE_TEST_SUITE_P(Models, GoldenBf16, ::testing::ValuesIn(kModels),
                         [](const auto& p) { return std::string(p.param); });

}  // namespace
}  // namespace fathom::golden
