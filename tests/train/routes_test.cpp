// What the routes of a text are, against what the model's own forward pass says.
#include "train/routes/routes.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <gmock/gmock.h>

#include "kernels/error.h"
#include "tests/model/small_model.h"
#include "tests/train/test_folder.h"
#include "train/routes/figures.h"

namespace fathom::routes {
namespace {

using model_test::SmallModel;
using ::testing::Each;
using ::testing::HasSubstr;

constexpr std::int64_t kSeq = 16;

std::int64_t count(const std::vector<std::uint8_t>& marks, std::size_t first, std::size_t last) {
  return std::accumulate(marks.begin() + static_cast<std::ptrdiff_t>(first),
                         marks.begin() + static_cast<std::ptrdiff_t>(last), std::int64_t{0});
}

// Two whole sequences and a short one.
constexpr std::int64_t kTokens = 2 * kSeq + 5;

Routes routes_of(SmallModel& m, const SelectionRule& rule = TopK{}) {
  return trace(m.context, m.model, {m.random_tokens(kTokens, 5), {}, kSeq}, rule);
}

TEST(Routes, TopKTakesExactlyKOfEverySequenceInEveryLayer) {
  SmallModel m(DType::F32, model_test::small_config(), model_test::routed(CausalMethod::Both));
  const Routes r = routes_of(m);
  EXPECT_EQ(r.sequences(), 3);
  ASSERT_EQ(r.routed.size(), 2u);
  EXPECT_TRUE(r.experts.empty());
  for (const RoutedTokens& layer : r.routed) {
    EXPECT_EQ(count(layer.kept, 0, 16), kept_tokens(0.25, kSeq));
    EXPECT_EQ(count(layer.kept, 16, 32), 4);
    EXPECT_EQ(count(layer.kept, 32, 37), kept_tokens(0.25, 5));
    EXPECT_EQ(layer.predicted.size(), static_cast<std::size_t>(kTokens));
    // Those of the largest scores.
    for (std::size_t i = 0; i < 16; ++i) {
      const auto larger = std::count_if(layer.scores.begin(), layer.scores.begin() + 16,
                                        [&](double s) { return s > layer.scores[i]; });
      EXPECT_EQ(layer.kept[i], larger < 4 ? 1 : 0) << i;
    }
  }
  EXPECT_EQ(r.routed[0].layer, 1);
  EXPECT_EQ(r.routed[1].layer, 3);
  EXPECT_EQ(r.deepest(), 2);
  const std::vector<std::int64_t> depths = r.depths();
  EXPECT_EQ(std::accumulate(depths.begin(), depths.end(), std::int64_t{0}),
            count(r.routed[0].kept, 0, kTokens) + count(r.routed[1].kept, 0, kTokens));
}

TEST(Routes, TheCausalRuleTakesWhatThePredictorSays) {
  SmallModel m(DType::F32, model_test::small_config(), model_test::routed(CausalMethod::Predictor));
  const double threshold = 0.4;
  const Routes r = routes_of(m, Causal{Causal::Logit::Predictor, threshold});
  for (const RoutedTokens& layer : r.routed) {
    for (std::size_t i = 0; i < layer.kept.size(); ++i)
      EXPECT_EQ(layer.kept[i] != 0, 1 / (1 + std::exp(-layer.predicted[i])) > threshold) << i;
    const RouterFigures f = figures_of(layer, threshold);
    EXPECT_EQ(f.kept, count(layer.kept, 0, kTokens));
    EXPECT_DOUBLE_EQ(*f.predicted_above, f.share);
  }
}

TEST(Routes, AreTheForwardPasssOwn) {
  SmallModel m(DType::F32, model_test::small_config(), model_test::routed(CausalMethod::Aux));
  const Routes r = routes_of(m);
  const Batch second = make_batch(m.context, 1, kSeq, {r.tokens.begin() + 16, r.tokens.begin() + 32}, {});
  const ForwardResult pass = m.model.forward(m.context, second, TopK{});
  for (std::size_t l = 0; l < 2; ++l) {
    const std::vector<double> scores = m.host(pass.routing[l].scores);
    EXPECT_TRUE(std::equal(scores.begin(), scores.end(), r.routed[l].scores.begin() + 16));
    for (const std::int32_t row : to_host<std::int32_t>(m.context.backend(), pass.routing[l].indices))
      EXPECT_EQ(r.routed[l].kept[16 + static_cast<std::size_t>(row)], 1);
  }
}

TEST(Routes, EveryExpertTakesItsShareOfEverySequence) {
  SmallModel m(DType::F32, model_test::small_config(),
               model_test::with_experts(model_test::by(CausalMethod::Aux), RoutingKind::ModeIntegrated));
  const Routes r = routes_of(m);
  EXPECT_TRUE(r.routed.empty());
  ASSERT_EQ(r.experts.size(), 4u);
  const std::int64_t each =
      2 * expert_tokens(m.model.routing().experts, kSeq) + expert_tokens(m.model.routing().experts, 5);
  for (const ExpertTokens& layer : r.experts) {
    EXPECT_THAT(layer.reached, Each(1));
    EXPECT_TRUE(layer.chosen.empty());
    const ExpertFigures f = figures_of(layer);
    EXPECT_THAT(f.load, Each(each));
    EXPECT_EQ(f.load.size(), 3u);
    EXPECT_DOUBLE_EQ(f.experts_a_token, 3.0 * static_cast<double>(each) / static_cast<double>(kTokens));
    EXPECT_FALSE(f.dropped.has_value());
    EXPECT_GT(f.noop_affinity, 0);
    for (std::size_t i = 0; i < static_cast<std::size_t>(kTokens); ++i) {
      double sum = 0;
      for (std::size_t e = 0; e < 5; ++e) sum += layer.affinity[e * static_cast<std::size_t>(kTokens) + i];
      EXPECT_NEAR(sum, 1, 1e-5);
    }
  }
}

TEST(Routes, TheExpertsOfAStagedBlockSeeTheTokensThatItKept) {
  SmallModel m(DType::F32, model_test::small_config(),
               model_test::with_experts(model_test::routed(CausalMethod::Aux), RoutingKind::ModeStaged));
  const Routes r = routes_of(m);
  ASSERT_EQ(r.routed.size(), 2u);
  ASSERT_EQ(r.experts.size(), 4u);
  EXPECT_EQ(r.experts[1].reached, r.routed[0].kept);
  EXPECT_EQ(r.experts[3].reached, r.routed[1].kept);
  EXPECT_THAT(r.experts[0].reached, Each(1));
  for (std::size_t i = 0; i < static_cast<std::size_t>(kTokens); ++i) {
    EXPECT_EQ(std::isnan(r.experts[1].affinity[i]), r.routed[0].kept[i] == 0);
    EXPECT_LE(r.experts[1].experts_of(i), 3 * r.routed[0].kept[i]);
  }
  EXPECT_EQ(r.deepest(), 2) << "depth is what routers say, not experts";
}

TEST(Routes, TokensThatFindNoRoomAreDroppedAndANoopIsAChoice) {
  SmallModel m(DType::F32, model_test::small_config(),
               model_test::tokens_choose({}, RoutingKind::ModeIntegrated, 2, 0.5));
  const Routes r = routes_of(m);
  double dropped = 0;
  for (const ExpertTokens& layer : r.experts) {
    const auto n = layer.reached.size();
    for (std::size_t i = 0; i < n; ++i) {
      int chosen = 0;
      for (std::size_t e = 0; e < 5; ++e) {
        chosen += layer.chosen[e * n + i];
        if (e < 3) {
          EXPECT_LE(layer.taken[e * n + i], layer.chosen[e * n + i]);
        }
      }
      EXPECT_EQ(chosen, 2);
    }
    const ExpertFigures f = figures_of(layer);
    const double experts = 2.0 * static_cast<double>(n) * (1 - *f.noop_chosen);
    const auto load = static_cast<double>(std::accumulate(f.load.begin(), f.load.end(), std::int64_t{0}));
    EXPECT_NEAR(*f.dropped, 1 - load / experts, 1e-12);
    dropped += *f.dropped;
    EXPECT_GT(*f.noop_chosen, 0);
  }
  EXPECT_GT(dropped, 0) << "or this test shows nothing";
}

TEST(Routes, RespectDocumentMasks) {
  SmallModel m(DType::F32, model_test::small_config(), model_test::routed(CausalMethod::Aux));
  Excerpt e{m.random_tokens(kSeq, 5), {}, kSeq};
  const Routes open = trace(m.context, m.model, e, TopK{});
  e.documents.assign(kSeq, 0);
  std::fill(e.documents.begin() + 6, e.documents.end(), 1);
  const Routes masked = trace(m.context, m.model, e, TopK{});
  for (std::size_t i = 0; i < kSeq; ++i)
    EXPECT_EQ(open.routed[0].scores[i] == masked.routed[0].scores[i], i < 6) << i;
}

TEST(Routes, OfADenseModelThereAreNone) {
  SmallModel m(DType::F32, model_test::small_config(), {});
  EXPECT_THAT(testing_support::message_of<UserError>([&] { require_routing(m.model, "runs/dense"); }),
              ::testing::AllOf(HasSubstr("runs/dense"), HasSubstr("routing.kind: none")));
  SmallModel routed(DType::F32, model_test::small_config(), model_test::routed(CausalMethod::Aux));
  require_routing(routed.model, "runs/mod");
  EXPECT_THAT(testing_support::message_of<UserError>([&] {
                trace(routed.context, routed.model, {{}, {}, kSeq}, TopK{});
              }),
              HasSubstr("empty"));
}

}  // namespace
}  // namespace fathom::routes
