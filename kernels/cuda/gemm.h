// Matrix products by cuBLASLt. For each shape its candidate algorithms are timed once, on the device at hand,
// and the choice is kept in memory and on disk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include <cuda_runtime_api.h>

#include "kernels/dtype.h"

namespace fathom::cuda {

/// C[m, n] = A op B, row-major, fp32 accumulation: what the three products of a linear layer need.
struct GemmShape {
  std::int64_t m = 0, n = 0, k = 0;
  bool transpose_a = false;  // A is stored [k, m]
  bool transpose_b = false;  // B is stored [n, k]
  DType in = DType::F32;     // of A and B
  DType out = DType::F32;    // of C
  bool accumulate = false;   // C += A B
  bool add_base = false;     // C = base + A B, base of C's type and shape and not C; not with accumulate
  std::int64_t batch = 1;    // products side by side: A, B and C are so many, one after the other
  // Elements from a row of A or B, as they are stored, to the next; 0: they are contiguous.
  std::int64_t a_stride = 0, b_stride = 0;

  auto key() const {
    return std::tuple(m, n, k, transpose_a, transpose_b, in, out, accumulate, add_base, batch, a_stride,
                      b_stride);
  }
};

class Gemm {
 public:
  /// `device_name` keys the choices on disk. UserError: cuBLASLt cannot be loaded.
  /// Deterministic: the same choice in every process, from products that are bit-equal run to run.
  Gemm(cudaStream_t stream, const std::string& device_name, bool deterministic);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  /// Of device memory; what NVIDIA recommends for Hopper.
  static constexpr std::size_t kWorkspaceBytes = 32U << 20;

  /// Products of no rows or columns do nothing; k = 0 gives zeros, or the base.
  void run(void* c, const void* a, const void* b, const GemmShape& s, const void* base = nullptr);

 private:
  struct Plan;
  struct State;
  using Key = decltype(std::tuple_cat(GemmShape{}.key(), std::tuple(std::uint32_t{})));
  std::unique_ptr<State> state_;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace fathom::cuda
