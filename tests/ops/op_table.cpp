#include "tests/ops/op_table.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <fmt/format.h>

#include "src/ops/attention.h"
#include "src/ops/linear.h"
#include "src/ops/loss.h"
#include "src/ops/mlp.h"
#include "src/ops/norm.h"
#include "src/ops/routing.h"
#include "tests/ops/operands.h"

namespace fathom::op_test {

namespace {

using Table = std::vector<OpCase>;
using Inputs = std::vector<Tensor>;
using Outputs = std::vector<Tensor>;

struct Matrix {
  std::int64_t rows, width;
};
struct Heads {
  ops::AttentionOptions options;
  std::int64_t head_dim;
};
struct Head {
  std::int64_t rows, width, vocab, chunk;
};
struct Members {
  std::int64_t rows, kept;
};

struct Shapes {
  std::vector<LinearShape> linear;
  std::vector<Matrix> matrices;
  std::vector<QkvShape> rope;
  std::vector<Heads> attention;
  std::vector<std::int64_t> documents;  // how much longer each document is than the one before
  std::vector<GatherShape> rows;
  std::int64_t embedding_vocab;
  std::vector<Head> heads;
  std::vector<Members> members;
};

const Shapes kSmall = {
    .linear = {{5, 7, 3}, {1, 16, 9}, {33, 20, 17}, {130, 64, 48}, {3, 1, 1}},
    .matrices = {{5, 7}, {1, 3}, {33, 20}, {130, 17}},
    .rope = {{5, 4, 2, 6}, {1, 2, 2, 4}, {37, 3, 1, 10}, {70, 2, 1, 16}},
    .attention = {{{2, 5, 4, 2}, 6}, {{3, 1, 2, 2}, 6}, {{1, 70, 2, 1}, 16}, {{2, 33, 3, 3}, 6}},
    .documents = {1},
    .rows = {{9, 4, 7}, {1, 1, 3}, {66, 17, 20}, {12, 12, 5}, {8, 1, 1}},
    .embedding_vocab = 4,  // fewer than most rows: tokens repeat
    .heads = {{5, 7, 11, 512}, {7, 4, 3, 2}, {33, 16, 40, 8}, {1, 3, 1, 1}},
    .members = {{9, 4}, {1, 1}, {130, 17}, {6, 6}},
};

const Shapes kLarge = {
    .linear = {{256, 768, 2304},
               {512, 1024, 768},
               {64, 2048, 1024},
               {257, 33, 100},
               {1000, 128, 33},
               {4096, 512, 256}},
    .matrices = {{512, 768}, {300, 1024}, {130, 2048}, {1000, 33}, {3, 5000}, {9000, 64}, {4801, 1024}},
    .rope = {{256, 12, 12, 64}, {257, 8, 2, 128}, {33, 3, 1, 34}, {4500, 4, 2, 64}},
    .attention = {{{2, 256, 2, 2}, 64},
                  {{1, 257, 4, 1}, 64},
                  {{1, 1000, 2, 1}, 64},
                  {{2, 256, 2, 1}, 128},
                  {{1, 1000, 1, 1}, 128},
                  {{3, 100, 3, 3}, 40},
                  {{2, 130, 2, 2}, 64},
                  {{1, 200, 4, 2}, 64}},
    .documents = {1, 37},
    .rows = {{2048, 256, 768}, {512, 64, 2048}, {1000, 125, 1024}, {700, 333, 33}},
    .embedding_vocab = 5,  // a token has hundreds of rows
    .heads = {{64, 64, 32768, 512},
              {100, 48, 4099, 33},
              {33, 64, 777, 512},
              {600, 64, 32768, 600},
              {900, 32, 8192, 900},
              {300, 32, 50304, 300}},
    .members = {{4096, 512}, {40001, 5000}},
};

std::string of(const Matrix& m) { return fmt::format("{}x{}", m.rows, m.width); }

void add_linear(Table& t, const Shapes& shapes) {
  for (const LinearShape& s : shapes.linear) {
    t.push_back(
        {.op = "linear",
         .variant = fmt::format("{}x{}x{}", s.rows, s.in, s.out),
         .operands = {real("x", {s.rows, s.in}, 1), weight("w", {s.out, s.in}, 2)},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::linear(c, in[0], in[1])}; }});
  }
}

void add_elementwise(Table& t, const Shapes& shapes) {
  for (const Matrix& m : shapes.matrices) {
    const Shape s{m.rows, m.width};
    t.push_back({.op = "add",
                 .variant = of(m),
                 .operands = {real("a", s, 1), real("b", s, 2)},
                 .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::add(c, in[0], in[1])}; }});
    t.push_back(
        {.op = "bias_silu",
         .variant = of(m),
         .operands = {real("x", s, 1, 0, 2), stat("bias", {m.width}, 2)},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::bias_silu(c, in[0], in[1])}; },
         .tolerance = 4e-6});
    t.push_back({.op = "swiglu",
                 .variant = of(m),
                 .operands = {real("gate_up", {m.rows, 2 * m.width}, 1, 0, 2)},
                 .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::swiglu(c, in[0])}; }});
    t.push_back(
        {.op = "row_score",
         .variant = of(m),
         .operands = {real("x", s, 1), stat("w", {1, m.width}, 2)},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::row_score(c, in[0], in[1])}; }});
    t.push_back({.op = "row_score",
                 .variant = of(m) + "_bias",
                 .operands = {real("x", s, 1), stat("w", {1, m.width}, 2), stat("bias", {1}, 3)},
                 .run = [](Context& c, const Inputs& in) -> Outputs {
                   return {ops::row_score(c, in[0], in[1], in[2])};
                 }});
  }
}

void add_norms(Table& t, const Shapes& shapes) {
  constexpr double kEps = 1e-3;  // large enough to show
  for (const Matrix& m : shapes.matrices) {
    const Shape s{m.rows, m.width};
    t.push_back({.op = "rms_norm",
                 .variant = of(m),
                 .operands = {real("x", s, 1), stat("w", {m.width}, 2, 1, 0.3)},
                 .run = [](Context& c, const Inputs& in) -> Outputs {
                   return {ops::rms_norm(c, in[0], in[1], kEps)};
                 },
                 .tolerance = 4e-6});
    const std::pair<const char*, std::vector<std::size_t>> uses[] = {
        {"both", {0, 1}}, {"sum_only", {0}}, {"norm_only", {1}}};
    for (const auto& [which, used] : uses) {
      t.push_back({.op = "add_rms_norm",
                   .variant = of(m) + "_" + which,
                   .operands = {real("x", s, 1), real("a", s, 2), stat("w", {m.width}, 3, 1, 0.3)},
                   .run = [](Context& c, const Inputs& in) -> Outputs {
                     auto [h, y] = ops::add_rms_norm(c, in[0], in[1], in[2], kEps);
                     return {h, y};
                   },
                   .tolerance = 4e-6,
                   .used = used});
    }
  }
}

void add_rope(Table& t, const Shapes& shapes) {
  // In fp32 the angle is rounded as well: by 6e-8 of a position in the hundreds.
  constexpr double kTolerance = 2e-5;
  for (const QkvShape& s : shapes.rope) {
    const ops::RopeOptions options{s.heads, s.kv_heads, 100.0, 1e-3};
    ops::RopeOptions scaled = options;
    scaled.scaling = {RopeScalingKind::Llama3, 4.0, 1.0, 4.0, 64};
    const std::string variant = fmt::format("{}rows{}heads{}kv{}d", s.rows, s.heads, s.kv_heads, s.head_dim);
    const Operand qkv = real("qkv", {s.rows, s.row_size()}, 1);
    std::vector<double> at = gaps(s.rows);
    for (std::size_t i = 300; i < at.size(); ++i) at[i] = at[i - 300];  // a large angle is a rounded one
    const Operand positions = index("positions", std::move(at));
    t.push_back({.op = "rope",
                 .variant = variant,
                 .operands = {qkv, positions},
                 .run = [options](Context& c, const Inputs& in) -> Outputs {
                   return {ops::rope(c, in[0], in[1], {}, {}, options)};
                 },
                 .tolerance = kTolerance});
    t.push_back({.op = "rope",
                 .variant = variant + "_scaled",
                 .operands = {qkv, positions},
                 .run = [scaled](Context& c, const Inputs& in) -> Outputs {
                   return {ops::rope(c, in[0], in[1], {}, {}, scaled)};
                 },
                 .tolerance = kTolerance});
    t.push_back({.op = "rope",
                 .variant = variant + "_qk_norm",
                 .operands = {qkv, positions, stat("q_norm", {s.head_dim}, 2, 1, 0.3),
                              stat("k_norm", {s.head_dim}, 3, 1, 0.3)},
                 .run = [options](Context& c, const Inputs& in) -> Outputs {
                   return {ops::rope(c, in[0], in[1], in[2], in[3], options)};
                 },
                 .tolerance = kTolerance});
  }
}

/// Documents see nothing before their own first row; each is `longer` rows longer than the one before, the
/// first of sequence b b rows longer still.
std::vector<double> document_starts(std::int64_t batch, std::int64_t seq, std::int64_t longer) {
  std::vector<double> first;
  for (std::int64_t b = 0; b < batch; ++b) {
    std::int64_t begin = 0;
    std::int64_t length = b + longer;
    for (std::int64_t i = 0; i < seq; ++i) {
      if (i == begin + length) begin = i, length += longer;
      first.push_back(static_cast<double>(begin));
    }
  }
  return first;
}

void add_attention(Table& t, const Shapes& shapes) {
  for (const auto& [o, head_dim] : shapes.attention) {
    const std::int64_t rows = o.batch * o.seq;
    const std::string variant =
        fmt::format("{}x{}_{}heads{}kv{}d", o.batch, o.seq, o.heads, o.kv_heads, head_dim);
    const Operand qkv = real("qkv", {rows, (o.heads + 2 * o.kv_heads) * head_dim}, 1);
    t.push_back({.op = "attention",
                 .variant = variant,
                 .operands = {qkv},
                 .run = [o = o](Context& c, const Inputs& in) -> Outputs {
                   return {ops::attention(c, in[0], {}, o)};
                 },
                 .tolerance = 1e-5});
    for (const std::int64_t longer : shapes.documents) {
      t.push_back({.op = "attention",
                   .variant = fmt::format("{}_first_key{}", variant, longer),
                   .operands = {qkv, index("first_key", document_starts(o.batch, o.seq, longer))},
                   .run = [o = o](Context& c, const Inputs& in) -> Outputs {
                     return {ops::attention(c, in[0], in[1], o)};
                   },
                   .tolerance = 1e-5});
    }
  }
}

void add_rows(Table& t, const Shapes& shapes) {
  for (const GatherShape& s : shapes.rows) {
    const std::string variant = fmt::format("{}of{}x{}", s.rows, s.source_rows, s.width);
    const Operand x = real("x", {s.source_rows, s.width}, 1);
    const Operand indices = index("indices", some_rows(s.source_rows, s.rows));
    t.push_back(
        {.op = "gather_rows",
         .variant = variant,
         .operands = {x, indices},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::gather_rows(c, in[0], in[1])}; },
         .tolerance = 1e-7});
    const std::pair<const char*, GateKind> gates[] = {
        {"raw", GateKind::Raw}, {"sigmoid", GateKind::Sigmoid}, {"tanh", GateKind::Tanh}};
    for (const auto& [which, gate] : gates) {
      t.push_back({.op = "gated_scatter",
                   .variant = variant + "_" + which,
                   .operands = {x, real("f", {s.rows, s.width}, 2), stat("r", {s.source_rows}, 3), indices},
                   .run = [gate = gate](Context& c, const Inputs& in) -> Outputs {
                     return {ops::gated_scatter(c, in[0], in[1], in[2], in[3], gate)};
                   },
                   .tolerance = 4e-6});
    }
  }
}

void add_embedding(Table& t, const Shapes& shapes) {
  for (const Matrix& m : shapes.matrices) {
    const std::int64_t vocab = shapes.embedding_vocab;
    t.push_back(
        {.op = "embedding",
         .variant = of(m),
         .operands = {weight("table", {vocab, m.width}, 1), index("tokens", ids(m.rows, vocab, 2))},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::embedding(c, in[0], in[1])}; },
         .tolerance = 4e-6});
  }
}

void add_losses(Table& t, const Shapes& shapes) {
  constexpr double kWeight = 0.37;
  for (const auto& [rows, width, vocab, chunk] : shapes.heads) {
    const ops::LossOptions options{.gradient_scale = kWeight, .chunk_rows = chunk};
    const std::string variant = fmt::format("{}x{}x{}_by{}", rows, width, vocab, chunk);
    const Operand x = real("x", {rows, width}, 1);
    // Logits of a size that a model has, whatever the width.
    const double stddev = std::min(1.0, 4.0 / std::sqrt(static_cast<double>(width)));
    const Operand w = weight("w", {vocab, width}, 2, 0, stddev);
    std::vector<double> targets = ids(rows, vocab, 3);
    const auto run = [options](Context& c, const Inputs& in) -> Outputs {
      return {ops::linear_cross_entropy(c, in[0], in[1], in[2], options)};
    };
    const OpCase plain{.op = "linear_cross_entropy",
                       .variant = variant,
                       .operands = {x, w, index("targets", targets)},
                       .run = run,
                       .tolerance = 1e-5,
                       .loss_weight = kWeight};
    t.push_back(plain);
    OpCase ignoring = plain;
    for (std::size_t i = 0; i < targets.size(); i += 3) targets[i] = -1;
    ignoring.variant += "_ignored";
    ignoring.operands[2] = index("targets", targets);
    t.push_back(ignoring);
    OpCase tied = plain;  // the weight is the embedding's table: both give it a gradient
    tied.variant += "_tied";
    tied.operands = {w, index("tokens", ids(rows, vocab, 4)), plain.operands[2]};
    tied.run = [options](Context& c, const Inputs& in) -> Outputs {
      return {ops::linear_cross_entropy(c, ops::embedding(c, in[0], in[1]), in[0], in[2], options)};
    };
    t.push_back(tied);
  }
  for (const auto& [rows, kept] : shapes.members) {
    t.push_back({.op = "membership_bce",
                 .variant = fmt::format("{}of{}", kept, rows),
                 .operands = {stat("r", {rows}, 1), index("indices", some_rows(rows, kept))},
                 .run = [](Context& c, const Inputs& in) -> Outputs {
                   return {ops::membership_bce(c, in[0], in[1], {.gradient_scale = kWeight})};
                 },
                 .tolerance = 4e-6,
                 .loss_weight = kWeight});
  }
}

Table table_of(const Shapes& shapes) {
  Table t;
  add_linear(t, shapes);
  add_elementwise(t, shapes);
  add_norms(t, shapes);
  add_rope(t, shapes);
  add_attention(t, shapes);
  add_rows(t, shapes);
  add_embedding(t, shapes);
  add_losses(t, shapes);
  return t;
}

}  // namespace

std::vector<OpCase> op_table() {
  Table t = table_of(kSmall);
  add_fused(t, Size::Small);
  add_experts(t, Size::Small);
  return t;
}

std::vector<OpCase> large_op_table() {
  Table t = table_of(kLarge);
  add_fused(t, Size::Large);
  add_experts(t, Size::Large);
  // Sums are longer and positions larger: what is rounded is rounded more often.
  for (OpCase& of : t) of.tolerance *= of.op == "rope" ? 8 : 4;
  return t;
}

double round_to_bf16(double x) {
  int exponent = 0;
  const double fraction = std::frexp(x, &exponent);
  constexpr int kBits = 8;  // with the implicit one; nearbyint rounds ties to even, as bf16 does
  return std::ldexp(std::nearbyint(std::ldexp(fraction, kBits)), exponent - kBits);
}

OpCase drawn(OpCase of) {
  for (Operand& o : of.operands) {
    if (o.values.empty()) o.values = o.draw();
  }
  return of;
}

OpCase rounded_to_bf16(OpCase of) {
  of = drawn(std::move(of));
  for (Operand& o : of.operands) {
    if (o.element != Element::Compute && o.element != Element::Weight) continue;
    for (double& x : o.values) x = round_to_bf16(x);
  }
  return of;
}

Evaluation evaluate(Context& c, const OpCase& of, Wanted wanted, std::size_t only) {
  Backend& backend = c.backend();
  std::vector<Tensor> inputs;
  for (std::size_t i = 0; i < of.operands.size(); ++i) {
    const Operand& o = of.operands[i];
    const std::vector<double> values = o.values.empty() ? o.draw() : o.values;
    if (o.element == Element::Index) {
      inputs.push_back(c.empty(o.shape, DType::I32));
      from_host(backend, inputs.back(), std::vector<std::int32_t>(values.begin(), values.end()));
      continue;
    }
    inputs.push_back(c.empty(o.shape, o.element == Element::Stat ? c.stat_dtype() : c.compute_dtype()));
    from_doubles(backend, inputs.back(), values);
    const bool asked = wanted == Wanted::All || (wanted == Wanted::Only && i == only);
    inputs.back().set_requires_grad(asked);
    if (asked && o.element == Element::Weight) inputs.back().bind_gradient(c.zeros(o.shape, c.stat_dtype()));
  }
  Tape tape(c);
  if (wanted != Wanted::None) c.set_tape(&tape);
  const std::vector<Tensor> outputs = of.run(c, inputs);
  c.set_tape(nullptr);

  Evaluation result;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    result.outputs.push_back(to_doubles(backend, outputs[i]));
    const bool used = of.used.empty() || std::find(of.used.begin(), of.used.end(), i) != of.used.end();
    if (!used) continue;
    const std::vector<double>& y = result.outputs.back();
    std::vector<double> dy(y.size(), of.loss_weight);
    if (of.loss_weight == 0) dy = normal(outputs[i].size(), static_cast<unsigned>(100 + i));
    for (double& x : dy) x = of.loss_weight == 0 ? round_to_bf16(x) : x;
    for (std::size_t j = 0; j < y.size(); ++j) result.objective += y[j] * dy[j];
    if (wanted == Wanted::None || of.loss_weight != 0) continue;
    const Tensor seed = c.empty(outputs[i].shape(), outputs[i].dtype());
    from_doubles(backend, seed, dy);
    tape.seed(outputs[i], seed);
  }
  if (wanted == Wanted::None) return result;
  tape.backward();
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const bool asked = inputs[i].requires_grad();
    const Tensor bound = inputs[i].bound_gradient();
    const Tensor g = !asked ? Tensor() : bound.defined() ? bound : tape.collected(inputs[i]);
    const Operand& o = of.operands[i];
    const std::size_t size = o.differentiable() ? static_cast<std::size_t>(o.shape.size()) : 0;
    result.gradients.push_back(g.defined() ? to_doubles(backend, g) : std::vector<double>(size, 0.0));
  }
  return result;
}

}  // namespace fathom::op_test
