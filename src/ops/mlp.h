#pragma once

#include "src/autograd/tape.h"
#include "src/ops/product.h"

namespace fathom::ops {

/// SwiGLU (Shazeer 2020): silu(gate) * up. gate_up [N, 2F], gate first -> [N, F].
Tensor swiglu(Context& c, const Tensor& gate_up);

/// swiglu(gate_up) W^T. The SwiGLU's output is kept in the place of `up`, which the backward finds in it: two
/// [N, F] in all. gate_up [N, 2F], W [out, F] -> [N, out]; or W [E, out, F], each for the next N/E rows. Who
/// gives the only handle of gate_up away has it written over.
Tensor swiglu_linear(Context& c, Tensor gate_up, const Weight& weight);
/// base + swiglu(gate_up) W^T, otherwise the same. base [N, out].
Tensor swiglu_linear_add(Context& c, const Tensor& base, Tensor gate_up, const Weight& weight);

/// Rows of a table. table [V, D], tokens int32 [N] -> [N, D].
Tensor embedding(Context& c, const Tensor& table, const Tensor& tokens);

}  // namespace fathom::ops
