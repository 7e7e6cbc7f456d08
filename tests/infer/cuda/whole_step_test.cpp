// Steps of decoding that a GPU does as a whole, against the whole text's forward pass in fp32 on the CPU with
// the same weights.
#include "infer/whole_step.h"

#include "tests/infer/cuda/whole_step_models.h"

namespace fathom::whole_step_test {
namespace {

std::vector<Case> cases() {
  return {
      {"dense64", 256, 4, 4, 512, false, true, {}},
      {"dense128_groups", 512, 4, 1, 288, true, false, {}},
      {"dense64_two_groups", 512, 8, 2, 256, true, true, {}},
      {"wide_heads", 256, 4, 2, 512, true, true, {}, 128},
      // More of each matrix than a block of threads' ring holds; at 9 rows and more its places are no whole
      // tiles.
      {"long", 1280, 20, 4, 5120, false, true, {}, 0, 1},
      {"long_routed", 768, 12, 12, 2816, true, true, depth(CausalMethod::Predictor, 2, Gate::Sigmoid), 0, 2},
      // Tiles that do not divide evenly: some blocks have one more of a matrix than others, or none; and rows
      // that are no whole lines.
      {"uneven", 544, 9, 3, 1088, true, true, {}, 64, 7},
      {"uneven_routed", 544, 9, 3, 1120, true, true, depth(CausalMethod::Predictor, 2, Gate::Sigmoid), 64},
      {"aux", 256, 4, 2, 512, true, true, depth(CausalMethod::Aux, 2, Gate::Sigmoid)},
      {"predictor", 256, 2, 2, 320, false, false, depth(CausalMethod::Predictor, 2, Gate::Raw)},
      {"every_layer", 320, 5, 5, 256, true, true, depth(CausalMethod::Predictor, 1, Gate::Tanh)},
      {"every_layer_aux", 256, 2, 1, 256, true, true, depth(CausalMethod::Aux, 1, Gate::Raw)}};
}

class CudaWholeSteps : public testing_support::OnCuda<::testing::TestWithParam<Case>> {
 protected:
  void expect_close_to_pass(const Schedule& schedule, std::int64_t context) {
    Pair m(shared_cuda(), GetParam(), context);
    expect_close(m, schedule);
  }
};

TEST_P(CudaWholeSteps, AreCloseToTheWholePass) { expect_close_to_pass({18, 40, 16, 90, 30}, 160); }

// Rows of one launch with thresholds of their own.
TEST_P(CudaWholeSteps, TakeEachRowsThreshold) {
  if (GetParam().routing.kind == RoutingKind::None) return;
  Schedule schedule{18, 40, 16, 90, 30};
  schedule.own_thresholds = true;
  expect_close_to_pass(schedule, 160);
}

// Steps over blocks that others have computed, and copies of those that were not full; of texts with one
// token behind what they share the first one comes of a step.
TEST_P(CudaWholeSteps, GoOnFromWhatOthersComputed) {
  Schedule schedule{18, 40, 16, 90, 30};
  schedule.shares = true;
  expect_close_to_pass(schedule, 160);
  schedule.own_thresholds = true;
  expect_close_to_pass(schedule, 160);
}

// Entries in many pieces, which are joined on the way or in a phase of their own.
TEST_P(CudaWholeSteps, AreCloseOverLongTexts) {
  expect_close_to_pass({1, 512, 64, 1500, 12}, 1600);
  expect_close_to_pass({4, 512, 32, 900, 12}, 1600);
}

// The device's own choice is what the host would have chosen from the same logits.
TEST_P(CudaWholeSteps, ChooseAsTheHostDoes) {
  Pair m(shared_cuda(), GetParam(), 160);
  const Schedule schedule{18, 40, 48, 60, 40};
  EngineStats stats;
  const std::vector<Text> watched = run(m, schedule, true, stats), chosen = run(m, schedule, false, stats);
  ASSERT_EQ(watched.size(), chosen.size());
  for (std::size_t i = 0; i < watched.size(); ++i) EXPECT_EQ(watched[i].ids, chosen[i].ids) << "text " << i;
}

// Texts so long, or so different, that their entries are dealt in pieces of equal size, against attention op
// by op over the same caches.
TEST_P(CudaWholeSteps, DealLongCachesEvenly) {
  Pair m(shared_cuda(), GetParam(), 70016);
  for (const std::vector<std::int64_t>& lengths : {std::vector<std::int64_t>{70000},
                                                   {70000, 40, 1, 33},
                                                   {40000, 15000, 15000, 15000},
                                                   {20000, 20000, 20000, 20000, 20000}}) {
    const auto whole = one_step(m, lengths, true), by_ops = one_step(m, lengths, false);
    ASSERT_EQ(whole.size(), lengths.size());
    expect_like(whole, by_ops);
  }
}

using CudaStepsOpByOp = testing_support::OnCuda<::testing::Test>;

// What a step of one launch does not know goes op by op, and is no less right: what products read is
// transformed, or queries and keys are where the cache holds numbers.
TEST_F(CudaStepsOpByOp, AreOfTransforms) {
  Pair m(shared_cuda(), cases().front(), 256);
  for (const OnlineHadamards& online : {OnlineHadamards{.down = true}, OnlineHadamards{.heads = true},
                                        OnlineHadamards{.queries_keys = true}}) {
    const Quantization rotated{.method = "rotate-only", .bits = 16, .kinds = {}, .online = online};
    Transformer transforms(m.gpu, m.on_gpu.config(), m.on_gpu.routing(), rotated);
    transforms.initialise(m.gpu, 1);
    EngineOptions o;
    o.cache.bytes = std::int64_t{1} << 24;
    Engine engine(m.gpu, transforms, o);
    engine.submit({.prompt = Ids(9, 7), .max_tokens = 3});
    while (!engine.idle()) engine.step();
    EXPECT_EQ(engine.stats().whole_steps, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, CudaWholeSteps, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

}  // namespace
}  // namespace fathom::whole_step_test
