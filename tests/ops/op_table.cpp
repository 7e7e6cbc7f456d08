#include "tests/ops/op_table.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>

#include <fmt/format.h>

#include "src/ops/attention.h"
#include "src/ops/linear.h"
#include "src/ops/loss.h"
#include "src/ops/mlp.h"
#include "src/ops/norm.h"
#include "src/ops/routing.h"

namespace fathom::op_test {

namespace {

std::vector<double> normal(std::int64_t n, unsigned seed, double mean = 0, double stddev = 1) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> distribution(mean, stddev);
  std::vector<double> values(static_cast<std::size_t>(n));
  for (double& x : values) x = distribution(generator);
  return values;
}

Operand real(const char* name, const Shape& shape, unsigned seed, double mean = 0, double stddev = 1) {
  return {name, shape, Element::Compute, normal(shape.size(), seed, mean, stddev)};
}

Operand stat(const char* name, const Shape& shape, unsigned seed) {
  return {name, shape, Element::Stat, normal(shape.size(), seed)};
}

Operand index(const char* name, std::vector<double> values) {
  const auto n = static_cast<std::int64_t>(values.size());
  return {name, {n}, Element::Index, std::move(values)};
}

/// n whole numbers below `limit`, repeats and all.
std::vector<double> ids(std::int64_t n, std::int64_t limit, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<std::int64_t> any(0, limit - 1);
  std::vector<double> values(static_cast<std::size_t>(n));
  for (double& x : values) x = static_cast<double>(any(generator));
  return values;
}

/// 0, 3, 4, 9, ...: positions with gaps, ascending.
std::vector<double> gaps(std::int64_t n) {
  std::vector<double> values;
  double at = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    values.push_back(at);
    at += static_cast<double>(1 + (i * i + 2) % 7);
  }
  return values;
}

/// `count` of `rows` rows, unique and ascending, unevenly spread.
std::vector<double> some_rows(std::int64_t rows, std::int64_t count) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(rows));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int64_t>(i);
  std::shuffle(all.begin(), all.end(), std::mt19937(static_cast<unsigned>(rows + count)));
  all.resize(static_cast<std::size_t>(count));
  std::sort(all.begin(), all.end());
  return {all.begin(), all.end()};
}

using Table = std::vector<OpCase>;
using Inputs = std::vector<Tensor>;
using Outputs = std::vector<Tensor>;

struct Matrix {
  std::int64_t rows, width;
};
constexpr Matrix kMatrices[] = {{5, 7}, {1, 3}, {33, 20}, {130, 17}};

std::string of(const Matrix& m) { return fmt::format("{}x{}", m.rows, m.width); }

void add_linear(Table& t) {
  const LinearShape shapes[] = {{5, 7, 3}, {1, 16, 9}, {33, 20, 17}, {130, 64, 48}, {3, 1, 1}};
  for (const LinearShape& s : shapes) {
    t.push_back(
        {.op = "linear",
         .variant = fmt::format("{}x{}x{}", s.rows, s.in, s.out),
         .operands = {real("x", {s.rows, s.in}, 1), real("w", {s.out, s.in}, 2)},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::linear(c, in[0], in[1])}; }});
  }
}

void add_elementwise(Table& t) {
  for (const Matrix& m : kMatrices) {
    const Shape s{m.rows, m.width};
    t.push_back({.op = "add",
                 .variant = of(m),
                 .operands = {real("a", s, 1), real("b", s, 2)},
                 .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::add(c, in[0], in[1])}; }});
    t.push_back(
        {.op = "bias_silu",
         .variant = of(m),
         .operands = {real("x", s, 1, 0, 2), real("bias", {m.width}, 2)},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::bias_silu(c, in[0], in[1])}; },
         .tolerance = 4e-6});
    t.push_back({.op = "swiglu",
                 .variant = of(m),
                 .operands = {real("gate_up", {m.rows, 2 * m.width}, 1, 0, 2)},
                 .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::swiglu(c, in[0])}; }});
    t.push_back(
        {.op = "row_score",
         .variant = of(m),
         .operands = {real("x", s, 1), real("w", {1, m.width}, 2)},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::row_score(c, in[0], in[1])}; }});
    t.push_back({.op = "row_score",
                 .variant = of(m) + "_bias",
                 .operands = {real("x", s, 1), real("w", {1, m.width}, 2), real("bias", {1}, 3)},
                 .run = [](Context& c, const Inputs& in) -> Outputs {
                   return {ops::row_score(c, in[0], in[1], in[2])};
                 }});
  }
}

void add_norms(Table& t) {
  constexpr double kEps = 1e-3;  // large enough to show
  for (const Matrix& m : kMatrices) {
    const Shape s{m.rows, m.width};
    t.push_back({.op = "rms_norm",
                 .variant = of(m),
                 .operands = {real("x", s, 1), real("w", {m.width}, 2, 1, 0.3)},
                 .run = [](Context& c, const Inputs& in) -> Outputs {
                   return {ops::rms_norm(c, in[0], in[1], kEps)};
                 },
                 .tolerance = 4e-6});
    const std::pair<const char*, std::vector<std::size_t>> uses[] = {
        {"both", {0, 1}}, {"sum_only", {0}}, {"norm_only", {1}}};
    for (const auto& [which, used] : uses) {
      t.push_back({.op = "add_rms_norm",
                   .variant = of(m) + "_" + which,
                   .operands = {real("x", s, 1), real("a", s, 2), real("w", {m.width}, 3, 1, 0.3)},
                   .run = [](Context& c, const Inputs& in) -> Outputs {
                     auto [h, y] = ops::add_rms_norm(c, in[0], in[1], in[2], kEps);
                     return {h, y};
                   },
                   .tolerance = 4e-6,
                   .used = used});
    }
  }
}

void add_rope(Table& t) {
  // In fp32 the angle is rounded as well: by 6e-8 of a position in the hundreds.
  constexpr double kTolerance = 2e-5;
  const QkvShape shapes[] = {{5, 4, 2, 6}, {1, 2, 2, 4}, {37, 3, 1, 10}, {70, 2, 1, 16}};
  for (const QkvShape& s : shapes) {
    const ops::RopeOptions options{s.heads, s.kv_heads, 100.0, 1e-3};
    const std::string variant = fmt::format("{}rows{}heads{}kv{}d", s.rows, s.heads, s.kv_heads, s.head_dim);
    const Operand qkv = real("qkv", {s.rows, s.row_size()}, 1);
    const Operand positions = index("positions", gaps(s.rows));
    t.push_back({.op = "rope",
                 .variant = variant,
                 .operands = {qkv, positions},
                 .run = [options](Context& c, const Inputs& in) -> Outputs {
                   return {ops::rope(c, in[0], in[1], {}, {}, options)};
                 },
                 .tolerance = kTolerance});
    t.push_back({.op = "rope",
                 .variant = variant + "_qk_norm",
                 .operands = {qkv, positions, real("q_norm", {s.head_dim}, 2, 1, 0.3),
                              real("k_norm", {s.head_dim}, 3, 1, 0.3)},
                 .run = [options](Context& c, const Inputs& in) -> Outputs {
                   return {ops::rope(c, in[0], in[1], in[2], in[3], options)};
                 },
                 .tolerance = kTolerance});
  }
}

void add_attention(Table& t) {
  const ops::AttentionOptions shapes[] = {{2, 5, 4, 2}, {3, 1, 2, 2}, {1, 70, 2, 1}, {2, 33, 3, 3}};
  for (const ops::AttentionOptions& o : shapes) {
    const std::int64_t head_dim = o.seq == 70 ? 16 : 6;
    const std::int64_t rows = o.batch * o.seq;
    const std::string variant = fmt::format("{}x{}_{}heads{}kv", o.batch, o.seq, o.heads, o.kv_heads);
    const Operand qkv = real("qkv", {rows, (o.heads + 2 * o.kv_heads) * head_dim}, 1);
    t.push_back(
        {.op = "attention",
         .variant = variant,
         .operands = {qkv},
         .run = [o](Context& c, const Inputs& in) -> Outputs { return {ops::attention(c, in[0], {}, o)}; },
         .tolerance = 1e-5});
    // Runs of 1, 2, 3, ... rows see nothing before their own first row.
    std::vector<double> first(static_cast<std::size_t>(rows));
    for (std::int64_t b = 0; b < o.batch; ++b) {
      std::int64_t begin = 0;
      std::int64_t length = b + 1;
      for (std::int64_t i = 0; i < o.seq; ++i) {
        if (i == begin + length) begin = i, ++length;
        first[static_cast<std::size_t>(b * o.seq + i)] = static_cast<double>(begin);
      }
    }
    t.push_back(
        {.op = "attention",
         .variant = variant + "_first_key",
         .operands = {qkv, index("first_key", first)},
         .run = [o](Context& c, const Inputs& in) -> Outputs { return {ops::attention(c, in[0], in[1], o)}; },
         .tolerance = 1e-5});
  }
}

void add_rows(Table& t) {
  const GatherShape shapes[] = {{9, 4, 7}, {1, 1, 3}, {66, 17, 20}, {12, 12, 5}, {8, 1, 1}};
  for (const GatherShape& s : shapes) {
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

void add_embedding(Table& t) {
  for (const Matrix& m : kMatrices) {
    constexpr std::int64_t kVocab = 4;  // fewer than most rows: tokens repeat
    t.push_back(
        {.op = "embedding",
         .variant = of(m),
         .operands = {real("table", {kVocab, m.width}, 1), index("tokens", ids(m.rows, kVocab, 2))},
         .run = [](Context& c, const Inputs& in) -> Outputs { return {ops::embedding(c, in[0], in[1])}; },
         .tolerance = 4e-6});
  }
}

void add_losses(Table& t) {
  constexpr double kWeight = 0.37;
  for (const auto& [rows, width, vocab, chunk] :
       {std::array<std::int64_t, 4>{5, 7, 11, 512}, {7, 4, 3, 2}, {33, 16, 40, 8}, {1, 3, 1, 1}}) {
    const ops::LossOptions options{.gradient_scale = kWeight, .chunk_rows = chunk};
    const std::string variant = fmt::format("{}x{}x{}_by{}", rows, width, vocab, chunk);
    const Operand x = real("x", {rows, width}, 1);
    const Operand w = real("w", {vocab, width}, 2);
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
  for (const auto& [rows, kept] : {std::pair<std::int64_t, std::int64_t>{9, 4}, {1, 1}, {130, 17}, {6, 6}}) {
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

}  // namespace

std::vector<OpCase> op_table() {
  Table t;
  add_linear(t);
  add_elementwise(t);
  add_norms(t);
  add_fused(t);
  add_rope(t);
  add_attention(t);
  add_rows(t);
  add_embedding(t);
  add_losses(t);
  return t;
}

Evaluation evaluate(Context& c, const OpCase& of, Wanted wanted, std::size_t only) {
  Backend& backend = c.backend();
  std::vector<Tensor> inputs;
  for (std::size_t i = 0; i < of.operands.size(); ++i) {
    const Operand& o = of.operands[i];
    if (o.element == Element::Index) {
      inputs.push_back(c.empty(o.shape, DType::I32));
      from_host(backend, inputs.back(), std::vector<std::int32_t>(o.values.begin(), o.values.end()));
      continue;
    }
    inputs.push_back(c.empty(o.shape, o.element == Element::Stat ? c.stat_dtype() : c.compute_dtype()));
    from_doubles(backend, inputs.back(), o.values);
    inputs.back().set_requires_grad(wanted == Wanted::All || (wanted == Wanted::Only && i == only));
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
    const std::vector<double> dy = of.loss_weight != 0
                                       ? std::vector<double>(y.size(), of.loss_weight)
                                       : normal(outputs[i].size(), static_cast<unsigned>(100 + i));
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
    const Tensor g = asked ? tape.collected(inputs[i]) : Tensor();
    const std::size_t size = of.operands[i].differentiable() ? of.operands[i].values.size() : 0;
    result.gradients.push_back(g.defined() ? to_doubles(backend, g) : std::vector<double>(size, 0.0));
  }
  return result;
}

double relative_difference(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return INFINITY;
  double difference = 0;
  double scale = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) < INFINITY)) return INFINITY;
    difference = std::max(difference, std::abs(a[i] - b[i]));
    scale = std::max(scale, std::abs(b[i]));
  }
  return scale > 0 ? difference / scale : difference;
}

}  // namespace fathom::op_test
