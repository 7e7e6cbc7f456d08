// Element types and devices, as the kernels know them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fathom {

enum class DType : std::uint8_t { F32, F64, BF16, I32, I64, U8 };

constexpr std::size_t size_of(DType t) {
  switch (t) {
    case DType::F32:
    case DType::I32:
      return 4;
    case DType::F64:
    case DType::I64:
      return 8;
    case DType::BF16:
      return 2;
    case DType::U8:
      return 1;
  }
  return 0;
}

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::F32:
      return "fp32";
    case DType::F64:
      return "fp64";
    case DType::BF16:
      return "bf16";
    case DType::I32:
      return "int32";
    case DType::I64:
      return "int64";
    case DType::U8:
      return "uint8";
  }
  return "?";
}

constexpr bool is_floating(DType t) { return t == DType::F32 || t == DType::F64 || t == DType::BF16; }

template <typename T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::F32;
};
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::F64;
};
template <>
struct dtype_of<std::int32_t> {
  static constexpr DType value = DType::I32;
};
template <>
struct dtype_of<std::int64_t> {
  static constexpr DType value = DType::I64;
};
template <>
struct dtype_of<std::uint8_t> {
  static constexpr DType value = DType::U8;
};

/// A typed pointer and a length: all that a kernel knows of a tensor. The data is contiguous.
struct View {
  void* data = nullptr;
  std::int64_t size = 0;  // elements
  DType dtype = DType::F32;

  explicit operator bool() const { return data != nullptr; }
};

struct ConstView {
  const void* data = nullptr;
  std::int64_t size = 0;  // elements
  DType dtype = DType::F32;

  ConstView() = default;
  ConstView(const void* d, std::int64_t n, DType t) : data(d), size(n), dtype(t) {}
  ConstView(const View& v)
      : data(v.data), size(v.size), dtype(v.dtype) {}  // NOLINT: a view of const is a view
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace fathom
