// From a backend's untyped views to typed, checked pointers.
#pragma once

#include <cstdint>

#include "kernels/cpu/host.h"
#include "kernels/dtype.h"

namespace fathom::cpu::FATHOM_ISA {

/// The data of a view that must hold `size` elements of type T; InternalError otherwise.
template <typename T>
const T* input(const char* op, const char* what, ConstView v, std::int64_t size) {
  check_size(op, what, v.size, size);
  if (v.dtype != dtype_of<T>::value) fail_type(op, what, v.dtype, dtype_of<T>::value);
  if (v.data == nullptr && size > 0) fail_null(op, what);
  return static_cast<const T*>(v.data);
}
template <typename T>
T* output(const char* op, const char* what, View v, std::int64_t size) {
  return const_cast<T*>(input<T>(op, what, v, size));
}

/// The same for views that may be null.
template <typename T>
const T* optional_input(const char* op, const char* what, ConstView v, std::int64_t size) {
  return v.data == nullptr ? nullptr : input<T>(op, what, v, size);
}
template <typename T>
T* optional_output(const char* op, const char* what, View v, std::int64_t size) {
  return v.data == nullptr ? nullptr : output<T>(op, what, v, size);
}

/// Checks that all indices lie in [low, high), so that no thread has to: it could not throw.
inline void check_indices(const char* op, const char* what, const std::int32_t* indices, std::int64_t n,
                          std::int64_t low, std::int64_t high) {
  std::int32_t least = 0x7fffffff, most = -0x7fffffff - 1;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (std::int64_t i = 0; i < n; ++i) {
    least = indices[i] < least ? indices[i] : least;
    most = indices[i] > most ? indices[i] : most;
  }
  if (n > 0 && least < low) fail(op, what, least, low);
  if (n > 0 && most >= high) fail(op, what, most, high - 1);
}

/// Calls body(T{}) with the compute type that `t` names.
template <typename Body>
void for_compute_type(const char* op, DType t, Body&& body) {
  if (t == DType::F32) {
    body(float{});
  } else if (t == DType::F64) {
    body(double{});
  } else {
    fail_dtype(op, t);
  }
}

}  // namespace fathom::cpu::FATHOM_ISA
