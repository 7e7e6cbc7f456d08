// The ops that fuse a product with what feeds it.
#include <utility>

#include <fmt/format.h>

#include "src/ops/linear.h"
#include "src/ops/mlp.h"
#include "src/ops/norm_linear.h"
#include "tests/ops/operands.h"

namespace fathom::op_test {

namespace {

constexpr double kEps = 1e-3;  // large enough to show

using Inputs = std::vector<Tensor>;
using Outputs = std::vector<Tensor>;

}  // namespace

void add_fused(std::vector<OpCase>& table, Size size) {
  const std::vector<LinearShape> small = {{5, 7, 3}, {1, 3, 4}, {6, 8, 8}, {33, 20, 17}, {130, 17, 40}};
  // More rows than a GPU computes at once, and rows of each of its classes of width.
  const std::vector<LinearShape> large = {{9000, 64, 24},  {4700, 768, 40},  {4701, 1024, 16},
                                          {600, 768, 768}, {2300, 2048, 64}, {700, 4096, 24},
                                          {400, 8192, 16}};
  const std::vector<LinearShape>& shapes = size == Size::Small ? small : large;
  for (const LinearShape& s : shapes) {
    const std::string variant = fmt::format("{}x{}x{}", s.rows, s.in, s.out);
    const Shape stream{s.rows, s.in};
    const Operand x = real("x", stream, 1), a = real("a", stream, 2), w = weight("w", {s.out, s.in}, 3);
    const Operand norm = stat("norm", {s.in}, 4, 1);
    // The backward divides by it.
    const Operand zeros = {"norm", {s.in}, Element::Stat, [in = s.in] {
                             std::vector<double> values = normal(in, 4, 1);
                             for (std::size_t j = 0; j < values.size(); j += 3) values[j] = 0;
                             return values;
                           }};
    for (const bool some_zeros : {false, true}) {
      table.push_back({.op = "rms_norm_linear",
                       .variant = variant + (some_zeros ? "_zeros" : ""),
                       .operands = {x, some_zeros ? zeros : norm, w},
                       .run = [](Context& c, const Inputs& in) -> Outputs {
                         return {ops::rms_norm_linear(c, in[0], in[1], in[2], kEps)};
                       },
                       .tolerance = 4e-6});
    }
    const std::pair<const char*, std::vector<std::size_t>> uses[] = {
        {"both", {0, 1}}, {"sum_only", {0}}, {"product_only", {1}}};
    for (const auto& [which, used] : uses) {
      // One large shape is enough for outputs that nobody uses: drawing millions of numbers takes seconds.
      if (size == Size::Large && used.size() == 1 && s.rows != large.front().rows) continue;
      table.push_back({.op = "add_rms_norm_linear",
                       .variant = variant + "_" + which,
                       .operands = {x, a, norm, w},
                       .run = [](Context& c, const Inputs& in) -> Outputs {
                         auto [h, y] = ops::add_rms_norm_linear(c, in[0], in[1], in[2], in[3], kEps);
                         return {h, y};
                       },
                       .tolerance = 4e-6,
                       .used = used});
    }
    table.push_back(
        {.op = "swiglu_linear",
         .variant = variant,
         .operands = {real("gate_up", {s.rows, 2 * s.in}, 5), w},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::swiglu_linear(c, in[0], in[1])}; },
         .tolerance = 4e-6});
    const Operand base = real("base", {s.rows, s.out}, 6);
    table.push_back({.op = "swiglu_linear_add",
                     .variant = variant,
                     .operands = {base, real("gate_up", {s.rows, 2 * s.in}, 5), w},
                     .run = [](Context& c, const Inputs& in) -> Outputs {
                       return {ops::swiglu_linear_add(c, in[0], in[1], in[2])};
                     },
                     .tolerance = 4e-6});
    table.push_back({.op = "linear_add",
                     .variant = variant,
                     .operands = {base, x, w},
                     .run = [](Context& c, const Inputs& in) -> Outputs {
                       return {ops::linear_add(c, in[0], in[1], in[2])};
                     },
                     .tolerance = 4e-6});
    // A residual branch as blocks have them: the norm's backward finds what the branch's end gave its input.
    if (s.in != s.out) continue;
    table.push_back(
        {.op = "linear_add",
         .variant = variant + "_around_a_norm",
         .operands = {x, norm, w},
         .run = [](Context& c, const Inputs& in) -> Outputs {
           return {ops::linear_add(c, in[0], ops::rms_norm_linear(c, in[0], in[1], in[2], kEps), in[2])};
         },
         .tolerance = 4e-6});
  }
}

}  // namespace fathom::op_test
