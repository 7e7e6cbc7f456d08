// The routed residual (Raposo et al. 2024, eq. 1): y = x, and y[i] += g(r[i]) f for the kept rows i.
#include <string.h>

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
struct Gate {
  T value, slope;
};

template <typename T>
Gate<T> gate_of(T r, GateKind kind) {
  switch (kind) {
    case GateKind::Raw:
      break;
    case GateKind::Sigmoid: {
      const T g = vsigmoid(r);
      return {g, g * vsigmoid(-r)};
    }
    case GateKind::Tanh: {
      const T g = vtanh(r);
      return {g, T(1) - g * g};
    }
  }
  return {r, T(1)};
}

template <typename T>
void forward(T* y, const T* x, const T* f, const T* r, const std::int32_t* indices, GateKind gate,
             const GatherShape& s) {
  const std::int64_t width = s.width;
  if (y != x) {
    parallel_for(s.source_rows * width, kGrain, [=](std::int64_t begin, std::int64_t end) {
      memcpy(y + begin, x + begin, static_cast<std::size_t>(end - begin) * sizeof(T));
    });
  }
  parallel_for(s.rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T g = gate_of(r[indices[i]], gate).value;
      T* to = y + indices[i] * width;
      const T* from = f + i * width;
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j) to[j] += g * from[j];
    }
  });
}

template <typename T>
void backward(T* df, T* dr, const T* dy, const T* f, const T* r, const std::int32_t* indices, GateKind gate,
              const GatherShape& s) {
  const std::int64_t width = s.width;
  parallel_for(s.rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = indices[i];
      const Gate<T> g = gate_of(r[row], gate);
      const T* d = dy + row * width;
      const T* from = f + i * width;
      T* to = df + i * width;
      T product = 0;
#pragma omp simd reduction(+ : product)
      for (std::int64_t j = 0; j < width; ++j) {
        product += d[j] * from[j];
        to[j] = g.value * d[j];
      }
      dr[row] += product * g.slope;
    }
  });
}

}  // namespace

void CpuBackend::gated_scatter_forward(View y, ConstView x, ConstView f, ConstView r, ConstView indices,
                                       GateKind gate, const GatherShape& s) {
  const char* op = "gated_scatter_forward";
  const auto* kept = input<std::int32_t>(op, "indices", indices, s.rows);
  check_indices(op, "an index", kept, s.rows, 0, s.source_rows);
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(output<T>(op, "y", y, s.source_rows * s.width), input<T>(op, "x", x, s.source_rows * s.width),
            input<T>(op, "f", f, s.rows * s.width), input<T>(op, "r", r, s.source_rows), kept, gate, s);
  });
}

void CpuBackend::gated_scatter_backward(View df, View dr_accumulate, ConstView dy, ConstView f, ConstView r,
                                        ConstView indices, GateKind gate, const GatherShape& s) {
  const char* op = "gated_scatter_backward";
  const auto* kept = input<std::int32_t>(op, "indices", indices, s.rows);
  check_indices(op, "an index", kept, s.rows, 0, s.source_rows);
  for_compute_type(op, df.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(output<T>(op, "df", df, s.rows * s.width), output<T>(op, "dr", dr_accumulate, s.source_rows),
             input<T>(op, "dy", dy, s.source_rows * s.width), input<T>(op, "f", f, s.rows * s.width),
             input<T>(op, "r", r, s.source_rows), kept, gate, s);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
