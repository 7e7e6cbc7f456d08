// Argument checks shared by the ops: InternalError with the op's tag, the layer and the shapes.
#pragma once

#include <cstdint>

#include "src/autograd/context.h"
#include "src/ops/product.h"

namespace fathom::ops {

/// Throws "[op] layer 3: x is [8, 16], expected ...": `what` names the argument.
[[noreturn]] void fail(const Context& c, const char* op, const char* what, const Tensor& given,
                       const Shape& expected);

/// x must have this shape.
void expect_shape(const Context& c, const char* op, const char* what, const Tensor& x, const Shape& expected);
/// x must be a matrix, of any shape.
void expect_matrix(const Context& c, const char* op, const char* what, const Tensor& x);
/// x must be a matrix of `width` columns; returns its rows.
std::int64_t expect_rows(const Context& c, const char* op, const char* what, const Tensor& x,
                         std::int64_t width);

/// The products x W^T of rows with one weight [out, in], or of E equal runs of rows with weights [E, out,
/// in], where x has `in` columns; or `parts` times as many, of which the product reads one part.
LinearShape linear_shape(const Context& c, const char* op, const char* what, const Tensor& x, const Weight& w,
                         std::int64_t parts = 1);

}  // namespace fathom::ops
