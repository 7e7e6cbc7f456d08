// Rows that are made and become codes in one pass: which kernel takes them.
#include <type_traits>

#include "kernels/code_operands.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/norm_rows.cuh"
#include "kernels/cuda/device/row_codes.cuh"
#include "kernels/cuda/row_codes.h"

namespace fathom::cuda {

namespace {

constexpr const char* kOp = "make_codes";

/// Of a norm, and of a transform, there is one pass; not of both, and not of a SwiGLU alone.
template <typename T>
bool make(const CodeSource& from, const RowQuantization& s, const CodesOut& out, int multiprocessors,
          cudaStream_t stream) {
  if (from.norm) {
    if (from.has_hadamard() || from.swiglu || s.x_row() != s.columns) return false;
    const std::int64_t n = s.rows * s.columns;
    const NormRows<T> p{from.addend ? output<T>(kOp, "sum", from.sum, n) : nullptr,
                        nullptr,
                        nullptr,
                        input<T>(kOp, "x", from.x, n),
                        optional_input<T>(kOp, "addend", from.addend, n),
                        input<float>(kOp, "norm", from.norm, s.columns),
                        s.rows,
                        s.columns,
                        static_cast<float>(from.norm_eps)};
    return norm_codes<T>(p, out, stream);
  }
  if (!from.has_hadamard()) return false;
  HadamardShape shape = from.hadamard;
  if (shape.width() != s.columns) fail(kOp, "width of the transform", shape.width(), s.columns);
  if (shape.rows != s.rows) fail(kOp, "rows of the transform", shape.rows, s.rows);
  shape.x_stride = from.swiglu ? 2 * s.columns : s.x_row();
  shape.y_stride = 0;
  const std::int64_t factor = shape.factor;
  const HadamardOperands<T> h{
      nullptr, input<T>(kOp, "x", from.x, from.swiglu ? 2 * s.rows * s.columns : s.x_size()),
      factor > 1 ? input<float>(kOp, "matrix", from.matrix, factor * factor) : nullptr, shape};
  if (hadamard_codes_by_butterflies<T>(h, from.swiglu, out, stream)) return true;
  // What butterflies take of rows alone is theirs here too: others would have other bits.
  if (takes_butterflies<T>(h)) return false;
  if constexpr (std::is_same_v<T, bf16>)
    return hadamard_codes_by_lines(h, from.swiglu, out, multiprocessors, stream);
  return false;
}

}  // namespace

bool CudaBackend::make_codes(View codes, View scales, const CodeSource& from, const RowQuantization& s) {
  check_row_quantization(kOp, s);
  const std::int64_t row_bytes = s.format().row_bytes();
  const CodesOut out{
      reinterpret_cast<std::int8_t*>(output<std::uint8_t>(kOp, "codes", codes, s.rows * row_bytes)),
      output<float>(kOp, "scales", scales, s.rows), row_bytes, CodeRule(s)};
  bool done = false;
  if (s.rows == 0) return false;
  for_compute_type(kOp, from.x.dtype, [&](auto zero) {
    done = make<decltype(zero)>(from, s, out, multiprocessors(), stream());
  });
  return done;
}

}  // namespace fathom::cuda
