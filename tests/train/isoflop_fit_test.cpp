// The fits on tables whose answers are known.
#include <cmath>
#include <random>

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "train/isoflop/bootstrap.h"
#include "train/isoflop/depth_test.h"
#include "train/isoflop/fit.h"
#include "train/isoflop/least_squares.h"
#include "train/isoflop/paper_claims.h"

namespace fathom::isoflop {
namespace {

using ::testing::HasSubstr;

// The loss of a family whose best size at budget C is 1e5 (C / 1e15)^a, with curvature k about it.
struct Law {
  double a = 0.5;
  double b = 0.05;
  double loss = 3.0;  // at 1e15
  double curvature = 0.4;
  double size = 1e5;
  double log_size(double c) const { return std::log10(size) + a * std::log10(c / 1e15); }
  double at(double log_n, double c) const {
    const double off = log_n - log_size(c);
    return loss * std::pow(c / 1e15, -b) + curvature * off * off;
  }
};

struct Table {
  std::vector<double> budgets = {1e15, 4e15, 1.6e16, 6.4e16};
  std::vector<double> offsets = {-0.5, -0.25, 0, 0.25, 0.5};  // of log10 N from the best one, less 0.06
  int seeds = 1;
  double noise = 0;

  void add(std::vector<Row>& rows, const std::string& family, const std::string& kind, const Law& law,
           unsigned seed) const {
    std::mt19937 random(seed);
    std::normal_distribution<double> error(0, noise > 0 ? noise : 1);
    for (const double c : budgets) {
      for (std::size_t i = 0; i < offsets.size(); ++i) {
        for (int s = 0; s < seeds; ++s) {
          const double log_n = law.log_size(c) + offsets[i] - 0.06;
          Row r;
          r.sweep = "made up";
          r.cell = family + "-" + std::to_string(i) + "-" + std::to_string(s);
          r.role = "grid";
          r.family = family;
          r.kind = kind;
          r.status = "done";
          r.budget = r.flops = c;
          r.params_active = std::llround(std::pow(10, log_n));
          r.params_total = r.params_active * (kind == "none" ? 1 : 2);
          r.width = 64;
          r.depth = 4;
          r.steps = 100;
          r.tokens = std::llround(c / 6 / std::pow(10, log_n));
          r.max_passes = 4;
          r.passes = 1;
          r.flops_per_token_forward = 2 * std::pow(10, log_n);
          r.step_seconds = 1e-8 * std::pow(10, log_n);
          r.seconds = *r.step_seconds * 100;
          const double loss =
              law.at(std::log10(static_cast<double>(r.params_active)), c) + (noise > 0 ? error(random) : 0);
          (kind == "none" ? r.val_loss : r.val_causal) = loss;
          if (kind != "none") r.val_topk = loss - 0.01;
          r.best_val = loss;
          rows.push_back(std::move(r));
        }
      }
    }
  }
  std::vector<Row> rows(const Law& law = {}, unsigned seed = 1) const {
    std::vector<Row> out;
    add(out, "dense", "none", law, seed);
    return out;
  }
};

bool holds(const Estimate& e, double truth) {
  return e.interval && e.interval->low <= truth && truth <= e.interval->high;
}

TEST(LeastSquares, SolvesWhatIsKnownAndRefusesWhatIsNot) {
  const auto fit = least_squares({{1, 0}, {1, 1}, {1, 2}, {1, 3}}, {1, 3, 5, 7});
  ASSERT_TRUE(fit);
  EXPECT_NEAR(fit->coefficients[0], 1, 1e-12);
  EXPECT_NEAR(fit->coefficients[1], 2, 1e-12);
  EXPECT_NEAR(fit->sum_of_squares, 0, 1e-20);
  EXPECT_FALSE(least_squares({{1, 2}, {2, 4}, {3, 6}}, {1, 2, 3}));
  EXPECT_FALSE(least_squares({{1, 2}}, {1}));
  const auto bounded = nonnegative_least_squares({{1, 0}, {1, 1}, {1, 2}}, {3, 2, 1});
  ASSERT_TRUE(bounded);
  EXPECT_NEAR(bounded->coefficients[0], 2, 1e-12);
  EXPECT_EQ(bounded->coefficients[1], 0);
}

TEST(Parabola, MeetsThreePointsExactly) {
  const std::vector<CurvePoint> points{{5, 3.2}, {5.5, 3.0}, {6.25, 3.4}};
  const auto p = fit_parabola(points);
  ASSERT_TRUE(p);
  for (const CurvePoint& q : points) EXPECT_NEAR(p->at(q.x), q.y, 1e-12);
  for (const double r : p->residuals) EXPECT_NEAR(r, 0, 1e-12);
  EXPECT_FALSE(fit_parabola(std::vector<CurvePoint>{{5, 1}, {6, 2}, {6, 3}}));
  const double x = *first_at(*p, 3.1, 5, 6.25);
  EXPECT_NEAR(p->at(x), 3.1, 1e-9);
  EXPECT_LT(x, p->minimum());
  EXPECT_FALSE(first_at(*p, 2.0, 5, 6.25));
}

TEST(StudentT, WidensAsTheTablesSay) {
  const std::pair<int, double> table[] = {{1, 12.706}, {2, 4.303},  {3, 3.182},
                                          {5, 2.571},  {10, 2.228}, {30, 2.042}};
  for (const auto& [freedom, t] : table) {
    ResidualPool pool;
    pool.add(std::vector<double>(static_cast<std::size_t>(freedom) + 3, 0.1), 3);
    EXPECT_NEAR(pool.widening(0.95) * 1.959964, t, 2e-3) << freedom;
  }
}

TEST(Fit, FindsTheExponentsOfATableWithoutNoise) {
  const std::vector<Row> rows = Table{}.rows();
  const Fit fit = fit_rows(rows);
  ASSERT_EQ(fit.curves.size(), 4u);
  for (const Curve& c : fit.curves) {
    ASSERT_TRUE(c.minimum && c.minimum->usable) << c.budget;
    EXPECT_NEAR(std::log10(c.minimum->n.value), Law{}.log_size(c.budget), 1e-4);
    EXPECT_TRUE(c.flags.empty());
  }
  ASSERT_EQ(fit.power_laws.size(), 1u);
  EXPECT_NEAR(fit.power_laws[0].n_exponent.value, 0.5, 1e-4);
  EXPECT_NEAR(fit.power_laws[0].loss_exponent.value, 0.05, 1e-6);
}

TEST(Fit, FindsTheExponentsWithinTheirIntervals) {
  const Fit fit = fit_rows(Table{.noise = 0.004}.rows());
  ASSERT_EQ(fit.power_laws.size(), 1u);
  const PowerLaw& p = fit.power_laws[0];
  EXPECT_TRUE(holds(p.n_exponent, 0.5)) << p.n_exponent.value;
  EXPECT_TRUE(holds(p.loss_exponent, 0.05)) << p.loss_exponent.value;
  EXPECT_LT(p.n_exponent.interval->high - p.n_exponent.interval->low, 0.2);
  EXPECT_NEAR(fit.noise, 0.004, 0.002);
  EXPECT_EQ(fit.noise_freedom, 4 * 2);
}

// 95 % intervals over repeated noise hold the truth about so often; the minimum, its loss and the exponent.
TEST(Fit, IntervalsCoverTheTruthAboutAsOftenAsTheySay) {
  constexpr int kTables = 200;
  int n = 0, loss = 0, exponent = 0;
  const Law law;
  for (int i = 0; i < kTables; ++i) {
    const Fit fit = fit_rows(Table{.noise = 0.004}.rows(law, 100 + static_cast<unsigned>(i)),
                             {.replicates = 300, .surfaces = false});
    const Curve& c = fit.curves[1];
    n += holds(c.minimum->n, std::pow(10, law.log_size(c.budget))) ? 1 : 0;
    loss += holds(c.minimum->loss, law.at(law.log_size(c.budget), c.budget)) ? 1 : 0;
    exponent += !fit.power_laws.empty() && holds(fit.power_laws[0].n_exponent, law.a) ? 1 : 0;
  }
  for (const int held : {n, loss, exponent}) {
    EXPECT_GE(held, kTables * 0.88);
    EXPECT_LE(held, kTables * 0.995);
  }
  std::printf("covered of %d: N_opt %d, L_opt %d, exponent %d\n", kTables, n, loss, exponent);
}

TEST(Fit, SaysNothingOfTheNoiseWhereThreeSizesMeetTheirParabola) {
  const Fit fit = fit_rows(Table{.offsets = {-0.4, 0, 0.4}}.rows());
  EXPECT_EQ(fit.noise_freedom, 0);
  EXPECT_FALSE(fit.curves[0].minimum->n.interval);
  EXPECT_TRUE(fit.curves[0].minimum->usable);
}

TEST(Fit, FlagsAMinimumAtTheGridsEdge) {
  std::vector<Row> rows = Table{.offsets = {0.3, 0.5, 0.7, 0.9}}.rows();
  const Fit right = fit_rows(rows);
  EXPECT_THAT(right.curves[0].flags, ::testing::Contains(HasSubstr("smaller sizes")));
  EXPECT_FALSE(right.curves[0].minimum->usable);
  EXPECT_TRUE(right.power_laws.empty());
  const Fit left = fit_rows(Table{.offsets = {-0.9, -0.7, -0.5, -0.3}}.rows());
  EXPECT_THAT(left.curves[0].flags, ::testing::Contains(HasSubstr("larger sizes")));
  const Fit down = fit_rows(Table{}.rows({.curvature = -0.4}));
  EXPECT_THAT(down.curves[0].flags, ::testing::Contains(HasSubstr("opens downwards")));
  const Fit two = fit_rows(Table{.offsets = {-0.2, 0.2}}.rows());
  EXPECT_THAT(two.curves[0].flags, ::testing::Contains(HasSubstr("fewer than three sizes")));
}

TEST(Fit, DrawsAndDoesNotFitCellsThatTellNothing) {
  std::vector<Row> rows = Table{.budgets = {1e15}, .offsets = {-0.5, -0.25, -0.1, 0.1, 0.25, 0.5}}.rows();
  rows[0].passes = 4.2;
  rows[1].best_val = *rows[1].val_loss * 0.99;
  rows[1].passes = 1.5;
  rows[4].best_val = *rows[4].val_loss * 0.99;  // within the first pass: not for having seen the text before
  rows[2].flops *= 1.02;
  rows[3].role = "search";
  rows.push_back(rows[4]);
  rows.back().status = "failed";
  rows.back().val_loss.reset();
  const Curve c = fit_rows(rows).curves.at(0);
  ASSERT_EQ(c.cells.size(), 5u);
  EXPECT_THAT(c.cells[0].left_out, HasSubstr("passes"));
  EXPECT_THAT(c.cells[1].left_out, HasSubstr("overfitted"));
  EXPECT_THAT(c.cells[2].left_out, HasSubstr("FLOPs"));
  EXPECT_TRUE(c.cells[3].left_out.empty());
  EXPECT_THAT(c.flags, ::testing::Contains(HasSubstr("fewer than three sizes")));
  for (Row& r : rows) r.status = "failed";
  EXPECT_THROW(fit_rows(rows), UserError);
}

TEST(Fit, JudgesARoutedFamilyByItsCausalLossAndFitsBoth) {
  std::vector<Row> rows;
  Table{}.add(rows, "mod", "mod", {}, 1);
  const Fit fit = fit_rows(rows);
  ASSERT_TRUE(fit.find("mod", "val_causal", 1e15) && fit.find("mod", "val_topk", 1e15));
  EXPECT_TRUE(fit.find("mod", "val_causal", 1e15)->judged);
  EXPECT_FALSE(fit.find("mod", "val_topk", 1e15)->judged);
  EXPECT_NEAR(fit.find("mod", "val_causal", 1e15)->minimum->loss.value -
                  fit.find("mod", "val_topk", 1e15)->minimum->loss.value,
              0.01, 1e-9);
}

TEST(Fit, IsAFunctionOfTheTableAlone) {
  const std::vector<Row> rows = Table{.seeds = 2, .noise = 0.01}.rows();
  EXPECT_EQ(fit_json(fit_rows(rows), rows), fit_json(fit_rows(rows), rows));
  EXPECT_TRUE(nlohmann::json::parse(fit_json(fit_rows(rows), rows)).is_object());
}

TEST(Surface, FindsItsConstants) {
  std::vector<SurfacePoint> points;
  for (const double n : {1e5, 3e5, 1e6, 3e6, 1e7}) {
    for (const double d : {1e7, 3e7, 1e8, 3e8})
      points.push_back({n, d, 1.7 + 400 / std::pow(n, 0.34) + 410 / std::pow(d, 0.28)});
  }
  const auto s = fit_surface(points);
  ASSERT_TRUE(s);
  EXPECT_NEAR(s->alpha, 0.34, 2e-3);
  EXPECT_NEAR(s->beta, 0.28, 2e-3);
  EXPECT_NEAR(s->e, 1.7, 0.02);
  EXPECT_NEAR(s->a / 400, 1, 0.05);
  EXPECT_NEAR(s->size_exponent(), 0.28 / 0.62, 5e-3);
  EXPECT_FALSE(s->at_limit);
  EXPECT_LT(s->rms, 1e-4);
  const auto again = fit_surface(points, &*s);
  EXPECT_NEAR(again->alpha, s->alpha, 1e-3);
  EXPECT_FALSE(fit_surface(std::span(points).first(5)));
}

class Claims : public ::testing::Test {
 protected:
  // A MoD family beside a dense one: `gain` lower in loss, `larger` times its size.
  std::vector<PaperClaim> claims(double gain, double larger, double noise = 0.002) {
    Table t{.noise = noise};
    t.add(rows, "dense", "none", {}, 5);
    t.add(rows, "mod", "mod", {.loss = 3.0 * (1 - gain), .size = 1e5 * larger}, 6);
    return test_claims(fit_rows(rows), rows);
  }
  static const PaperClaim& find(const std::vector<PaperClaim>& all, const std::string& id) {
    for (const PaperClaim& c : all) {
      if (c.id == id) return c;
    }
    throw InternalError("no claim " + id);
  }
  std::vector<Row> rows;
};

TEST_F(Claims, HoldWhereTheWholeIntervalIsOnTheirSide) {
  const std::vector<PaperClaim> all = claims(0.01, 1.0);
  EXPECT_EQ(find(all, "lower_loss").verdict, Verdict::Held);
  EXPECT_NEAR(find(all, "lower_loss").estimate.value, -0.01, 0.002);
  EXPECT_EQ(find(all, "larger").verdict, Verdict::Held);  // twice the parameters of the active ones
  EXPECT_NEAR(find(all, "larger").estimate.value, 2, 0.2);
  EXPECT_EQ(find(all, "same_forward_flops").verdict, Verdict::Held);
  EXPECT_EQ(find(all, "steps_faster").verdict, Verdict::Held);
  EXPECT_EQ(find(all, "compounds").verdict, Verdict::NotTestable);
  EXPECT_EQ(find(all, "beats_stochastic").verdict, Verdict::NotTestable);
  EXPECT_EQ(find(all, "depth_before_width").verdict, Verdict::NotTestable);
  for (const PaperClaim& c : all) EXPECT_TRUE(c.verdict != Verdict::NotTestable || !c.why.empty()) << c.id;
}

// The same cells, some of them on a slower kind of device: their step times are left out.
TEST_F(Claims, StepsOfOneKindOfDeviceAreCompared) {
  const double alone = find(claims(0.01, 1.0), "steps_faster").estimate.value;
  for (Row& r : rows) r.device = "fast";
  for (std::size_t i = 0; i < rows.size(); i += 3) {
    Row slow = rows[i];
    slow.seed += 1;
    slow.device = "slow";
    if (slow.step_seconds) *slow.step_seconds *= slow.family == "dense" ? 1 : 5;
    rows.push_back(slow);
  }
  EXPECT_NEAR(find(test_claims(fit_rows(rows), rows), "steps_faster").estimate.value, alone, 0.02);
}

TEST_F(Claims, DoNotHoldWhereItIsOnTheOther) {
  const std::vector<PaperClaim> all = claims(-0.01, 3.0);
  EXPECT_EQ(find(all, "lower_loss").verdict, Verdict::NotHeld);
  EXPECT_EQ(find(all, "same_forward_flops").verdict, Verdict::NotHeld);
  EXPECT_EQ(find(all, "steps_faster").verdict, Verdict::NotHeld);
  EXPECT_THAT(find(all, "steps_faster").figure, HasSubstr("no size reaches"));
}

TEST_F(Claims, CannotBeToldWhereItReachesBoth) {
  const std::vector<PaperClaim> all = claims(0.0003, 1.0, 0.02);
  EXPECT_EQ(find(all, "lower_loss").verdict, Verdict::NotTestable);
  EXPECT_THAT(find(all, "lower_loss").why, HasSubstr("both sides"));
}

TEST_F(Claims, TellDepthFromWidthWhereShapesDifferAtOneSize) {
  std::vector<Row> both;
  Table{.noise = 0.001}.add(both, "mod", "mod", {}, 7);
  const std::size_t n = both.size();
  for (std::size_t i = 0; i < n; ++i) {
    Row r = both[i];
    r.depth *= 4;
    r.cell += "-deep";
    *r.val_causal += -0.02 + ((i % 3) - 1.0) * 0.001;
    both.push_back(r);
  }
  const DepthTest t = test_depth(fit_rows(both), both, "mod");
  EXPECT_EQ(t.why, "");
  EXPECT_NEAR(t.effect.value, -0.02 / std::log10(4), 0.005);
  ASSERT_TRUE(t.effect.interval);
  EXPECT_LT(t.effect.interval->high, 0);
}

}  // namespace
}  // namespace fathom::isoflop
