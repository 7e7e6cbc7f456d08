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
  if (weight.dtype != weight_dtype) fail_type(op, "w", weight.dtype, weight_dtype);
  if (s.batch < 1) fail(op, "batch", s.batch, 1);
  if (rows_in.size != s.x_size()) fail(op, "x", rows_in.size, s.x_size());
  if (rows_out.size != s.batch * s.rows * s.out) fail(op, "y", rows_out.size, s.batch * s.rows * s.out);
  if (weight.size != s.batch * s.out * s.in) fail(op, "w", weight.size, s.batch * s.out * s.in);
}

void check_type(const char* op, ConstView rows_in, ConstView rows_out) {
  if (rows_out.dtype != rows_in.dtype) fail_type(op, "y", rows_out.dtype, rows_in.dtype);
}

// Scores are of fp32 when x is of bf16.
template <typename T, typename Out>
void invariant(View y, ConstView x, ConstView w, const LinearShape& s, cudaStream_t stream) {
  for (std::int64_t e = 0; e < s.batch; ++e) {
    linear_invariant(static_cast<Out*>(y.data) + e * s.rows * s.out,
                     static_cast<const T*>(x.data) + e * s.rows * s.x_row(),
                     static_cast<const T*>(w.data) + e * s.out * s.in, s, stream);
  }
}

GemmShape forward(const LinearShape& s, DType in, DType out, bool add_base) {
  return {.m = s.rows,
          .n = s.out,
          .k = s.in,
          .transpose_b = true,
          .in = in,
          .out = out,
          .add_base = add_base,
          .batch = s.batch,
          .a_stride = s.x_stride};
}

GemmShape weight_gradient(const LinearShape& s, DType in, bool accumulate) {
  return {.m = s.out,
          .n = s.in,
          .k = s.rows,
          .transpose_a = true,
          .in = in,
          .out = DType::F32,
          .accumulate = accumulate,
          .batch = s.batch,
          .b_stride = s.x_stride};
}

}  // namespace

void CudaBackend::linear_forward(View y, ConstView x, ConstView w, const LinearShape& s) {
  check_shape("linear", x, w, y, s, x.dtype);
  if (y.dtype != DType::F32) check_type("linear", x, y);
  flop_log.gemm(s.batch * s.rows, s.out, s.in);
  if (options_.invariant) {
    for_compute_type("linear", x.dtype, [&](auto zero) {
      using T = decltype(zero);
      y.dtype == DType::F32 ? invariant<T, float>(y, x, w, s, stream_) : invariant<T, T>(y, x, w, s, stream_);
    });
    return;
  }
  gemm_->run(y.data, x.data, w.data, forward(s, x.dtype, y.dtype, false));
}

void CudaBackend::linear_add_forward(View y, ConstView base, ConstView x, ConstView w, const LinearShape& s) {
  // Invariant: rows have the bits of a product and a sum.
  if (options_.invariant) return Backend::linear_add_forward(y, base, x, w, s);
  check_shape("linear", x, w, y, s, x.dtype);
  check_type("linear", x, y);
  if (base.dtype != y.dtype) fail_type("linear", "base", base.dtype, y.dtype);
  if (base.size != y.size) fail("linear", "base", base.size, y.size);
  // Under FATHOM_INITCHECK outputs are cleared first; and what cuBLASLt allows in place depends on the
  // algorithm.
  if (y.size > 0 && base.data == y.data) throw InternalError("[linear] base is y: it would be overwritten");
  flop_log.gemm(s.batch * s.rows, s.out, s.in);
  gemm_->run(y.data, x.data, w.data, forward(s, x.dtype, y.dtype, true), base.data);
}

void CudaBackend::linear_backward_input(View dx, ConstView dy, ConstView w, const LinearShape& s) {
  check_shape("linear backward", dx, w, dy, s, dx.dtype);
  check_type("linear backward", dx, dy);
  flop_log.gemm(s.batch * s.rows, s.in, s.out);
  gemm_->run(dx.data, dy.data, w.data,
             {.m = s.rows, .n = s.in, .k = s.out, .in = dy.dtype, .out = dx.dtype, .batch = s.batch});
}

void CudaBackend::linear_backward_weight(View dw, ConstView dy, ConstView x, const LinearShape& s) {
  check_shape("linear backward", x, dw, dy, s, DType::F32);
  check_type("linear backward", x, dy);
  flop_log.gemm(s.batch * s.out, s.in, s.rows);
  gemm_->run(dw.data, dy.data, x.data, weight_gradient(s, dy.dtype, false));
}

void CudaBackend::linear_backward_weight_accumulate(View dw, ConstView dy, ConstView x,
                                                    const LinearShape& s) {
  check_shape("linear backward", x, dw, dy, s, DType::F32);
  check_type("linear backward", x, dy);
  flop_log.gemm(s.batch * s.out, s.in, s.rows);
  gemm_->run(dw.data, dy.data, x.data, weight_gradient(s, dy.dtype, true));
}

}  // namespace fathom::cuda
