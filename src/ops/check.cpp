#include "src/ops/check.h"

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom::ops {

void fail(const Context& c, const char* op, const char* what, const Tensor& given, const Shape& expected) {
  throw InternalError(fmt::format("[{}]{}{} {} is {}, expected {}", op, c.layer().empty() ? "" : " ",
                                  c.layer(), what, given.defined() ? given.shape().str() : "undefined",
                                  expected.str()));
}

void expect_shape(const Context& c, const char* op, const char* what, const Tensor& x,
                  const Shape& expected) {
  if (!x.defined() || x.shape() != expected) fail(c, op, what, x, expected);
}

void expect_matrix(const Context& c, const char* op, const char* what, const Tensor& x) {
  if (!x.defined() || x.shape().rank() != 2) fail(c, op, what, x, Shape{-1, -1});
}

std::int64_t expect_rows(const Context& c, const char* op, const char* what, const Tensor& x,
                         std::int64_t width) {
  if (!x.defined() || x.shape().rank() != 2 || x.dim(1) != width) fail(c, op, what, x, Shape{-1, width});
  return x.dim(0);
}

LinearShape linear_shape(const Context& c, const char* op, const char* what, const Tensor& x, const Weight& w,
                         std::int64_t parts) {
  const bool batched = w.defined() && w.shape().rank() == 3;
  if (!batched && !w.is_packed()) expect_matrix(c, op, "w", w.tensor());
  const std::int64_t in = w.shape()[-1], batch = batched ? w.shape()[0] : 1, columns = parts * in;
  const std::int64_t rows = expect_rows(c, op, what, x, columns);
  if (batch < 1 || rows % batch != 0) fail(c, op, what, x, Shape{batch, -1, columns});
  LinearShape s{rows / batch, in, w.shape()[-2], batch};
  if (parts > 1) s.x_stride = columns;
  return s;
}

}  // namespace fathom::ops
