// The generic checks over the op table: finite differences in double, fp32 against fp64, each gradient alone.
#include "tests/ops/op_table.h"

#include <algorithm>
#include <cmath>
#include <set>

#include <gtest/gtest.h>

namespace fathom::op_test {
namespace {

class OpTable : public ::testing::TestWithParam<OpCase> {
 protected:
  static Context context(DType dtype) { return {make_cpu_backend({}, 2), dtype}; }
};

// A stencil of five points: (f(-2h) - 8 f(-h) + 8 f(h) - f(2h)) / 12h, its own error of order h^4.
TEST_P(OpTable, GradientIsThatOfFiniteDifferences) {
  constexpr double kStep = 4e-4;
  constexpr std::size_t kLookedAt = 60;  // entries of an operand
  Context c = context(DType::F64);
  OpCase of = drawn(GetParam());
  const Evaluation at = evaluate(c, of, Wanted::All);
  // Unless the softmax or the membership has one outcome only, a gradient of zero would mean that nothing was
  // checked.
  double all = 0;
  for (std::size_t i = 0; i < of.operands.size(); ++i) {
    if (!of.operands[i].differentiable()) continue;
    std::vector<double>& values = of.operands[i].values;
    double scale = 1e-3;  // where a gradient is zero, so are the differences
    for (double g : at.gradients[i]) scale = std::max(scale, std::abs(g)), all += std::abs(g);
    const std::size_t stride = std::max<std::size_t>(1, values.size() / kLookedAt) | 1;
    for (std::size_t j = 0; j < values.size(); j += stride) {
      const double kept = values[j];
      const auto objective = [&](double offset) {
        values[j] = kept + offset;
        return evaluate(c, of, Wanted::None).objective;
      };
      const double slope =
          (objective(-2 * kStep) - 8 * objective(-kStep) + 8 * objective(kStep) - objective(2 * kStep)) /
          (12 * kStep);
      values[j] = kept;
      EXPECT_LT(std::abs(slope - at.gradients[i][j]) / scale, 1e-7)
          << of.operands[i].name << "[" << j << "]: " << at.gradients[i][j] << ", by differences " << slope;
    }
  }
  const bool one_outcome = of.variant.find("x1_by") != std::string::npos;
  EXPECT_EQ(all < 1e-3, one_outcome) << all;
}

TEST_P(OpTable, SinglePrecisionIsCloseToDouble) {
  Context single = context(DType::F32);
  Context exact = context(DType::F64);
  const Evaluation a = evaluate(single, GetParam(), Wanted::All);
  const Evaluation b = evaluate(exact, GetParam(), Wanted::All);
  ASSERT_EQ(a.outputs.size(), b.outputs.size());
  for (std::size_t i = 0; i < a.outputs.size(); ++i) {
    EXPECT_LT(relative_difference(a.outputs[i], b.outputs[i]), GetParam().tolerance) << "output " << i;
  }
  for (std::size_t i = 0; i < a.gradients.size(); ++i) {
    EXPECT_LT(relative_difference(a.gradients[i], b.gradients[i]), GetParam().tolerance)
        << GetParam().operands[i].name;
  }
}

// What a gradient is does not depend on which others are wanted, and recording changes no output.
TEST_P(OpTable, EachGradientAlone) {
  Context c = context(DType::F64);
  const OpCase& of = GetParam();
  const Evaluation all = evaluate(c, of, Wanted::All);
  EXPECT_EQ(evaluate(c, of, Wanted::None).outputs, all.outputs);
  for (std::size_t i = 0; i < of.operands.size(); ++i) {
    if (!of.operands[i].differentiable()) continue;
    const Evaluation alone = evaluate(c, of, Wanted::Only, i);
    EXPECT_EQ(alone.gradients[i], all.gradients[i]) << of.operands[i].name;
    EXPECT_EQ(alone.outputs, all.outputs);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, OpTable, ::testing::ValuesIn(op_table()),
                         [](const auto& p) { return p.param.name(); });

TEST(OpTableItself, HasEveryDifferentiableOpAndNoNameTwice) {
  std::set<std::string> ops, names;
  for (const OpCase& of : op_table()) {
    ops.insert(of.op);
    EXPECT_TRUE(names.insert(of.name()).second) << of.name();
  }
  EXPECT_EQ(ops, (std::set<std::string>{"linear",         "linear_add",        "add",
                                        "bias_silu",      "row_score",         "rms_norm",
                                        "add_rms_norm",   "rms_norm_linear",   "add_rms_norm_linear",
                                        "rope",           "attention",         "swiglu",
                                        "swiglu_linear",  "swiglu_linear_add", "embedding",
                                        "gather_rows",    "gated_scatter",     "linear_cross_entropy",
                                        "membership_bce", "choice_logits",     "expert_affinity",
                                        "choice_scores",  "expert_gather",     "expert_combine",
                                        "token_choice",   "balance_loss",      "z_loss"}));
}

}  // namespace
}  // namespace fathom::op_test
