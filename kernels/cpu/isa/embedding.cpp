// out[i] = table[tokens[i]].
#include <string.h>

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

std::int64_t rows_of_table(const char* op, ConstView table, std::int64_t width) {
  if (width < 1) fail(op, "width", width, 1);
  if (table.size % width != 0) fail(op, "table", table.size, table.size / width * width);
  return table.size / width;
}

template <typename T>
void forward(T* out, const T* table, const std::int32_t* tokens, std::int64_t rows, std::int64_t width) {
  parallel_for(rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      memcpy(out + i * width, table + tokens[i] * width, static_cast<std::size_t>(width) * sizeof(T));
    }
  });
}

/// Rows of a table of bf16, as floats.
void forward_from_bf16(float* out, const std::uint16_t* table, const std::int32_t* tokens, std::int64_t rows,
                       std::int64_t width) {
  parallel_for(rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::uint16_t* from = table + tokens[i] * width;
      for (std::int64_t j = 0; j < width; ++j) {
        const std::uint32_t word = static_cast<std::uint32_t>(from[j]) << 16;
        memcpy(out + i * width + j, &word, sizeof(word));
      }
    }
  });
}

/// Threads own columns, and each adds the rows in their order: every element's sum has one order.
template <typename T>
void backward(T* dtable, const T* dout, const std::int32_t* tokens, std::int64_t rows, std::int64_t width) {
  constexpr std::int64_t kLine = 32;
  const std::int64_t share = (width + threads() - 1) / threads();
  parallel_for(width, (share + kLine - 1) / kLine * kLine, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = 0; i < rows; ++i) {
      T* to = dtable + tokens[i] * width;
      const T* from = dout + i * width;
#pragma omp simd
      for (std::int64_t j = begin; j < end; ++j) to[j] += from[j];
    }
  });
}

}  // namespace

void CpuBackend::embedding_forward(View out, ConstView table, ConstView tokens, std::int64_t rows,
                                   std::int64_t width) {
  const char* op = "embedding_forward";
  const std::int64_t vocab = rows_of_table(op, table, width);
  const auto* ids = input<std::int32_t>(op, "tokens", tokens, rows);
  check_indices(op, "a token", ids, rows, 0, vocab);
  if (table.dtype == DType::BF16 && out.dtype == DType::F32) {
    if (table.data == nullptr) fail_null(op, "table");
    forward_from_bf16(output<float>(op, "out", out, rows * width),
                      static_cast<const std::uint16_t*>(table.data), ids, rows, width);
    return;
  }
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(output<T>(op, "out", out, rows * width), input<T>(op, "table", table, vocab * width), ids, rows,
            width);
  });
}

void CpuBackend::embedding_backward_accumulate(View dtable, ConstView dout, ConstView tokens,
                                               std::int64_t rows, std::int64_t width) {
  const char* op = "embedding_backward";
  const std::int64_t vocab = rows_of_table(op, dtable, width);
  const auto* ids = input<std::int32_t>(op, "tokens", tokens, rows);
  check_indices(op, "a token", ids, rows, 0, vocab);
  for_compute_type(op, dtable.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(output<T>(op, "dtable", dtable, vocab * width), input<T>(op, "dout", dout, rows * width), ids,
             rows, width);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
