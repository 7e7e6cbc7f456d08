#include "src/ops/weight_gradient.h"

namespace fathom::ops {

namespace {

void add_to(Context& c, const Tape::Sum& sum, const Tensor& dy, ConstView x, const LinearShape& s) {
  if (sum.empty) {
    c.backend().linear_backward_weight(sum.tensor, dy, x, s);
  } else {
    c.backend().linear_backward_weight_accumulate(sum.tensor, dy, x, s);
  }
}

}  // namespace

void add_weight_gradient(Context& c, Tape& t, const Tensor& w, const Tensor& dy, ConstView x,
                         const LinearShape& s) {
  if (w.requires_grad()) add_to(c, t.begin_or_sum(w), dy, x, s);
}

void add_linear_gradients(Context& c, Tape& t, const Tensor& dx, const Tensor& w, const Tensor& dy,
                          ConstView x, const LinearShape& s) {
  const LinearShape of_input{s.rows, s.in, s.out, s.batch};  // dx is contiguous
  const auto input = [&] { c.backend().linear_backward_input(dx, dy, w, of_input); };
  if (!w.requires_grad()) return input();
  const Tape::Sum sum = t.begin_or_sum(w);  // before the two, since it may fill the sum with zeros
  // The weight's first: then dx is read as soon as it is written, partly from a cache.
  c.backend().side_by_side([&] { add_to(c, sum, dy, x, s); }, input);
}

}  // namespace fathom::ops
