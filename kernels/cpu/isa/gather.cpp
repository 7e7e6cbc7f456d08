// out[i] = x[indices[i]], by rows and for single integers.
#include <string.h>

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
void forward(T* out, const T* x, const std::int32_t* indices, const GatherShape& s) {
  const std::int64_t width = s.width;
  parallel_for(s.rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      memcpy(out + i * width, x + indices[i] * width, static_cast<std::size_t>(width) * sizeof(T));
    }
  });
}

template <typename T>
void backward(T* dx, const T* dout, const std::int32_t* indices, const GatherShape& s) {
  const std::int64_t width = s.width;
  parallel_for(s.rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      T* to = dx + indices[i] * width;
      const T* from = dout + i * width;
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j) to[j] += from[j];
    }
  });
}

}  // namespace

void CpuBackend::gather_rows_forward(View out, ConstView x, ConstView indices, const GatherShape& s) {
  const char* op = "gather_rows_forward";
  const auto* kept = input<std::int32_t>(op, "indices", indices, s.rows);
  check_indices(op, "an index", kept, s.rows, 0, s.source_rows);
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(output<T>(op, "out", out, s.rows * s.width), input<T>(op, "x", x, s.source_rows * s.width), kept,
            s);
  });
}

void CpuBackend::gather_rows_backward_accumulate(View dx, ConstView dout, ConstView indices,
                                                 const GatherShape& s) {
  const char* op = "gather_rows_backward";
  const auto* kept = input<std::int32_t>(op, "indices", indices, s.rows);
  check_indices(op, "an index", kept, s.rows, 0, s.source_rows);
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(output<T>(op, "dx", dx, s.source_rows * s.width), input<T>(op, "dout", dout, s.rows * s.width),
             kept, s);
  });
}

void CpuBackend::gather_int32(View out, ConstView in, ConstView indices) {
  const char* op = "gather_int32";
  const auto* kept = input<std::int32_t>(op, "indices", indices, out.size);
  check_indices(op, "an index", kept, out.size, 0, in.size);
  auto* to = output<std::int32_t>(op, "out", out, out.size);
  const auto* from = input<std::int32_t>(op, "in", in, in.size);
  for (std::int64_t i = 0; i < out.size; ++i) to[i] = from[kept[i]];
}

}  // namespace fathom::cpu::FATHOM_ISA
