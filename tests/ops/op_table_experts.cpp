// The ops of expert layers, and the products that have a weight for each run of rows.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "src/ops/experts.h"
#include "src/ops/linear.h"
#include "src/ops/mlp.h"
#include "src/ops/token_choice.h"
#include "tests/ops/op_table.h"
#include "tests/ops/operands.h"

namespace fathom::op_test {

namespace {

using Inputs = std::vector<Tensor>;
using Outputs = std::vector<Tensor>;

/// For each expert some rows, counted through [E, N]: other ones for each, so that some rows are taken by
/// several experts and some by none.
Operand choices_of(const ExpertShape& s) {
  std::vector<double> indices;
  for (std::int64_t e = 0; e < s.experts; ++e) {
    std::vector<double> own = some_rows(s.rows, s.slots);
    for (double& row : own) row = static_cast<double>((static_cast<std::int64_t>(row) + 2 * e) % s.rows);
    std::sort(own.begin(), own.end());
    for (double row : own) indices.push_back(static_cast<double>(e * s.rows) + row);
  }
  return index("indices", indices);
}

ops::Dispatch dispatch_of(Context& c, const Tensor& indices, const ExpertShape& s) {
  ops::Dispatch d{s, c.empty({s.experts * s.slots}, DType::I32), c.empty({s.experts, s.rows}, DType::I32)};
  c.backend().expert_slots(d.rows, d.slots, indices, s);
  return d;
}

void add_products(std::vector<OpCase>& table, const std::vector<LinearShape>& shapes) {
  for (const LinearShape& s : shapes) {
    const std::string variant = fmt::format("{}of_{}x{}x{}", s.batch, s.rows, s.in, s.out);
    const Operand w = weight("w", {s.batch, s.out, s.in}, 2);
    table.push_back(
        {.op = "linear",
         .variant = variant,
         .operands = {real("x", {s.batch * s.rows, s.in}, 1), w},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::linear(c, in[0], in[1])}; }});
    table.push_back(
        {.op = "swiglu_linear",
         .variant = variant,
         .operands = {real("gate_up", {s.batch * s.rows, 2 * s.in}, 5), w},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::swiglu_linear(c, in[0], in[1])}; },
         .tolerance = 4e-6});
  }
}

void add_choices(std::vector<OpCase>& table, const std::vector<LinearShape>& shapes) {
  for (const LinearShape& s : shapes) {
    const std::string variant = fmt::format("{}x{}_{}choices", s.rows, s.in, s.out);
    const double scale = 1.5 / std::sqrt(static_cast<double>(s.in));
    table.push_back(
        {.op = "choice_logits",
         .variant = variant,
         .operands = {real("x", {s.rows, s.in}, 1), weight("w", {s.out, s.in}, 2, 0, scale)},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::choice_logits(c, in[0], in[1])}; },
         .tolerance = 4e-6});
    const Operand logits = stat("logits", {s.rows, s.out}, 3, 0, 1.5);
    const std::pair<const char*, std::vector<std::size_t>> uses[] = {
        {"both", {0, 1}}, {"affinity", {0}}, {"lse", {1}}};
    for (const auto& [which, used] : uses) {
      table.push_back({.op = "expert_affinity",
                       .variant = variant + "_" + which,
                       .operands = {logits},
                       .run = [](Context& c, const Inputs& in) -> Outputs {
                         const ops::Affinity a = ops::expert_affinity(c, in[0]);
                         return {a.affinity, a.lse};
                       },
                       .tolerance = 1e-5,
                       .used = used});
    }
    table.push_back(
        {.op = "choice_scores",
         .variant = variant,
         .operands = {logits},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::choice_scores(c, in[0])}; }});
    table.push_back(
        {.op = "choice_scores",
         .variant = variant + "_bias",
         .operands = {logits, stat("bias", {s.out}, 4)},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::choice_scores(c, in[0], in[1])}; },
         .tolerance = 4e-6});
  }
}

void add_rows(std::vector<OpCase>& table, const std::vector<ExpertShape>& shapes) {
  for (const ExpertShape& s : shapes) {
    const std::string variant = fmt::format("{}experts_{}of{}x{}", s.experts, s.slots, s.rows, s.width);
    const Operand indices = choices_of(s);
    table.push_back({.op = "expert_gather",
                     .variant = variant,
                     .operands = {real("x", {s.rows, s.width}, 1), indices},
                     .run = [s](Context& c, const Inputs& in) -> Outputs {
                       return {ops::expert_gather(c, in[0], dispatch_of(c, in[1], s))};
                     },
                     .tolerance = 1e-6});
    for (const std::int64_t noop : {0, 2}) {
      table.push_back({.op = "expert_combine",
                       .variant = variant + (noop > 0 ? "_noop" : ""),
                       .operands = {real("f", {s.experts * s.slots, s.width}, 1),
                                    stat("affinity", {s.experts + noop, s.rows}, 2), indices},
                       .run = [s](Context& c, const Inputs& in) -> Outputs {
                         return {ops::expert_combine(c, in[0], in[1], dispatch_of(c, in[2], s))};
                       },
                       .tolerance = 4e-6});
    }
  }
}

/// Positive, as a softmax is, and clear of ties.
Operand affinities(std::int64_t choices, std::int64_t rows) {
  Operand a = stat("affinity", {choices, rows}, 3);
  a.draw = [normal = a.draw] {
    std::vector<double> values = normal();
    for (double& x : values) x = std::exp(x);
    return values;
  };
  return a;
}

void add_token_choice(std::vector<OpCase>& table, const std::vector<SequenceChoices>& shapes) {
  constexpr double kWeight = 0.7;
  for (const SequenceChoices& s : shapes) {
    const Operand affinity = affinities(s.choices, s.rows);
    for (const std::int64_t top_k : {1, 2}) {
      if (top_k > s.choices) continue;
      table.push_back({.op = "token_choice",
                       .variant = fmt::format("top{}of{}_{}rows", top_k, s.choices, s.rows),
                       .operands = {affinity},
                       .run = [top_k](Context& c, const Inputs& in) -> Outputs {
                         return {ops::token_choice(c, in[0], top_k)};
                       },
                       .tolerance = 4e-6});
    }
    table.push_back({.op = "balance_loss",
                     .variant = fmt::format("{}of{}_{}choices", s.seq, s.rows, s.choices),
                     .operands = {affinity},
                     .run = [s](Context& c, const Inputs& in) -> Outputs {
                       const Tensor weights =
                           ops::token_choice(c, in[0].detach(), std::min<std::int64_t>(2, s.choices));
                       return {ops::balance_loss(c, in[0], weights, s.seq, {.gradient_scale = kWeight})};
                     },
                     .tolerance = 4e-6,
                     .loss_weight = kWeight});
    table.push_back({.op = "z_loss",
                     .variant = fmt::format("{}rows_{}choices", s.rows, s.choices),
                     .operands = {stat("lse", {s.rows}, 4, 2)},
                     .run = [](Context& c, const Inputs& in) -> Outputs {
                       return {ops::z_loss(c, in[0], {.gradient_scale = kWeight})};
                     },
                     .loss_weight = kWeight});
  }
}

}  // namespace

void add_experts(std::vector<OpCase>& table, Size size) {
  if (size == Size::Small) {
    add_products(table, {{5, 7, 3, 2}, {1, 16, 9, 3}, {33, 20, 17, 4}, {2, 3, 4, 1}});
    add_choices(table, {{5, 7, 3}, {1, 4, 2}, {33, 20, 9}, {70, 16, 40}});
    add_token_choice(table, {{6, 3, 4}, {1, 1, 1}, {130, 65, 9}, {40, 8, 3}});
    add_rows(table, {{9, 3, 4, 7}, {1, 2, 1, 3}, {66, 4, 17, 20}, {8, 1, 8, 5}, {12, 40, 2, 8}});
  } else {
    add_products(table, {{256, 128, 192, 8}, {130, 64, 33, 3}});
    add_choices(table, {{1024, 768, 8}, {300, 33, 70}});
    add_token_choice(table, {{2048, 1024, 8}, {700, 350, 70}});
    add_rows(table, {{1024, 8, 128, 768}, {700, 3, 333, 33}, {512, 64, 16, 2048}});
  }
}

}  // namespace fathom::op_test
