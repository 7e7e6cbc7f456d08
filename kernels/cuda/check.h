// From untyped views to typed, checked pointers, and from CUDA's codes to errors. Host code.
#pragma once

#include <cstdint>
#include <string>

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include "kernels/dtype.h"
#include "kernels/error.h"

namespace fathom {

template <>
struct dtype_of<__nv_bfloat16> {
  static constexpr DType value = DType::BF16;
};

}  // namespace fathom

namespace fathom::cuda {

using bf16 = __nv_bfloat16;

/// InternalError "[op] CUDA: ...", a DeviceError where the device is lost to this process. A sticky error of
/// an earlier launch shows here too, and says so. UserError when the device has no more memory.
void check(cudaError_t code, const char* op);
/// After a launch: configuration errors now, faults of the kernel at the next check.
inline void check_launch(const char* op) { check(cudaGetLastError(), op); }

/// A library's call failed: InternalError with the message, or a DeviceError where the cause is that the
/// device is lost.
[[noreturn]] void fail_library(const std::string& message);

[[noreturn]] void fail(const char* op, const char* what, std::int64_t given, std::int64_t expected);
[[noreturn]] void fail_type(const char* op, const char* what, DType given, DType expected);
[[noreturn]] void fail_dtype(const char* op, DType given);
/// MemoryError: the device has no more memory for `what`.
[[noreturn]] void fail_memory(const char* what);
[[noreturn]] void fail_null(const char* op, const char* what);

/// The data of a view that must hold `size` elements of type T; InternalError otherwise.
template <typename T>
const T* input(const char* op, const char* what, ConstView v, std::int64_t size) {
  if (v.size != size) fail(op, what, v.size, size);
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

/// Calls body(T{}) with the compute type that `t` names: float or bf16.
template <typename Body>
void for_compute_type(const char* op, DType t, Body&& body) {
  if (t == DType::F32) {
    body(float{});
  } else if (t == DType::BF16) {
    body(bf16{});
  } else {
    fail_dtype(op, t);
  }
}

/// Bytes of shared memory that a block may ask for on the current device: 227 KiB on Hopper, 163 on sm_80, 99
/// on sm_86 and sm_89.
std::int64_t most_shared_bytes();

/// Whether 16 bytes at once can be read from here.
inline bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

/// How many blocks of `per_block` cover n.
inline unsigned blocks_for(std::int64_t n, std::int64_t per_block) {
  return static_cast<unsigned>((n + per_block - 1) / per_block);
}

}  // namespace fathom::cuda
