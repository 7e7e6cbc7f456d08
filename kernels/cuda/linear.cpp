// y = x W^T and its gradients: cuBLASLt, or in the row-invariant mode a product of our own
// (linear_invariant.cu).
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/linear_invariant.h"

namespace fathom::cuda {

namespace {

void check_shape(const char* op, ConstView rows_in, ConstView weight, ConstView rows_out,
                 const LinearShape& s, DType weight_dtype) {
  const DType t = rows_in.dtype;
  if (t != DType::F32 && t != DType::BF16) fail_dtype(op, t);
  if (rows_out.dtype != t) fail_type(op, "y", rows_out.dtype, t);
  if (weight.dtype != weight_dtype) fail_type(op, "w", weight.dtype, weight_dtype);
  if (rows_in.size != s.rows * s.in) fail(op, "x", rows_in.size, s.rows * s.in);
  if (rows_out.size != s.rows * s.out) fail(op, "y", rows_out.size, s.rows * s.out);
  if (weight.size != s.out * s.in) fail(op, "w", weight.size, s.out * s.in);
}

GemmShape weight_gradient(const LinearShape& s, DType in, bool accumulate) {
  return {.m = s.out,
          .n = s.in,
          .k = s.rows,
          .transpose_a = true,
          .in = in,
          .out = DType::F32,
          .accumulate = accumulate};
}

}  // namespace

void CudaBackend::linear_forward(View y, ConstView x, ConstView w, const LinearShape& s) {
  check_shape("linear", x, w, y, s, x.dtype);
  flop_log.gemm(s.rows, s.out, s.in);
  if (options_.invariant) {
    for_compute_type("linear", x.dtype, [&](auto zero) {
      using T = decltype(zero);
      linear_invariant(static_cast<T*>(y.data), static_cast<const T*>(x.data), static_cast<const T*>(w.data),
                       s, stream_);
    });
    return;
  }
  gemm_->run(y.data, x.data, w.data,
             {.m = s.rows, .n = s.out, .k = s.in, .transpose_b = true, .in = x.dtype, .out = y.dtype});
}

void CudaBackend::linear_backward_input(View dx, ConstView dy, ConstView w, const LinearShape& s) {
  check_shape("linear backward", dx, w, dy, s, dx.dtype);
  flop_log.gemm(s.rows, s.in, s.out);
  gemm_->run(dx.data, dy.data, w.data, {.m = s.rows, .n = s.in, .k = s.out, .in = dy.dtype, .out = dx.dtype});
}

void CudaBackend::linear_backward_weight(View dw, ConstView dy, ConstView x, const LinearShape& s) {
  check_shape("linear backward", x, dw, dy, s, DType::F32);
  flop_log.gemm(s.out, s.in, s.rows);
  gemm_->run(dw.data, dy.data, x.data, weight_gradient(s, dy.dtype, false));
}

void CudaBackend::linear_backward_weight_accumulate(View dw, ConstView dy, ConstView x,
                                                    const LinearShape& s) {
  check_shape("linear backward", x, dw, dy, s, DType::F32);
  flop_log.gemm(s.out, s.in, s.rows);
  gemm_->run(dw.data, dy.data, x.data, weight_gradient(s, dy.dtype, true));
}

}  // namespace fathom::cuda
