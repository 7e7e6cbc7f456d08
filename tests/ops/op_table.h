// The shared table of differentiable ops: one entry an op and a shape, with its inputs as doubles. Nothing
// here knows a backend: evaluate() runs an entry in whatever Context it is given, so the same entries serve
// finite differences in double, fp32 against fp64, and one backend against another.
#pragma once

#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "src/autograd/tape.h"
#include "tests/relative_difference.h"

namespace fathom::op_test {

using testing_support::relative_difference;

/// What an input is made of: the compute dtype, the stat dtype (kernels/backend.h), or int32. A Weight is of
/// the compute dtype too, and a parameter: its gradient is added up in the stat dtype.
enum class Element : std::uint8_t { Compute, Weight, Stat, Index };

struct Operand {
  std::string name;
  Shape shape;
  Element element = Element::Compute;
  /// Makes the values: the large tables hold gigabytes of them, and a test wants those of one op.
  std::function<std::vector<double>()> draw;
  std::vector<double> values = {};  // where drawn() or a test has put some, instead of draw's
  bool differentiable() const { return element != Element::Index; }
};

struct OpCase {
  std::string op;       // as in src/ops
  std::string variant;  // shapes and options, letters and digits only
  std::vector<Operand> operands;
  /// Runs the op; `inputs` are in the order of `operands`.
  std::function<std::vector<Tensor>(Context&, const std::vector<Tensor>& inputs)> run;
  /// fp32 against fp64, relative to the largest element of an output or a gradient.
  double tolerance = 2e-6;
  /// A loss seeds its own gradient: that of loss_weight * the sum of its only output. 0: not a loss.
  double loss_weight = 0;
  /// Outputs whose gradient is given; the others count as unused. Empty: all.
  std::vector<std::size_t> used = {};

  std::string name() const { return op + "_" + variant; }
  friend void PrintTo(const OpCase& c, std::ostream* out) { *out << c.name(); }
};

enum class Size : std::uint8_t { Small, Large };
/// Ops whose backward finds in what they kept what they did not keep (op_table_fused.cpp).
void add_fused(std::vector<OpCase>& table, Size size);
/// Expert layers (op_table_experts.cpp).
void add_experts(std::vector<OpCase>& table, Size size);

/// Every differentiable op of src/ops, ragged shapes included.
std::vector<OpCase> op_table();
/// The same at the sizes of trainings, for backends that are fast enough.
std::vector<OpCase> large_op_table();

/// The case with its operands' values in it, for who changes them.
OpCase drawn(OpCase of);

/// The nearest number that bf16 holds.
double round_to_bf16(double x);
/// The case with inputs that bf16 holds, so that a backend in bf16 and one in fp64 see the same numbers.
OpCase rounded_to_bf16(OpCase of);

struct Evaluation {
  std::vector<std::vector<double>> outputs;
  std::vector<std::vector<double>> gradients;  // by operand; zeros where nothing arrived, empty for indices
  double objective = 0;                        // what the gradients are of
};

/// Which inputs want a gradient.
enum class Wanted : std::uint8_t { None, All, Only };

/// Runs `of`, and its backward unless nothing is wanted; with Wanted::Only, operand `only` alone wants a
/// gradient. The gradient given to output i is a fixed vector of random numbers, which bf16 holds.
Evaluation evaluate(Context& c, const OpCase& of, Wanted wanted, std::size_t only = 0);

}  // namespace fathom::op_test
