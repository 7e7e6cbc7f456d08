// What the kernel tests share: typed buffers that read as doubles, and a suite over instruction sets and
// dtypes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "kernels/error.h"

namespace fathom::kernel_test {

/// Elements of one dtype, written and read as doubles; writing rounds (bf16 by way of fp32).
class Buffer {
 public:
  Buffer(DType dtype, std::int64_t n, double value = 0)
      : dtype_(dtype), size_(n), bytes_(static_cast<std::size_t>(n) * size_of(dtype) + sizeof(double)) {
    for (std::int64_t i = 0; i < n; ++i) set(i, value);
  }
  Buffer(DType dtype, const std::vector<double>& values)
      : Buffer(dtype, static_cast<std::int64_t>(values.size())) {
    for (std::int64_t i = 0; i < size_; ++i) set(i, values[static_cast<std::size_t>(i)]);
  }

  std::int64_t size() const { return size_; }
  void set(std::int64_t i, double x) {
    switch (dtype_) {
      case DType::F32:
        return put(i, static_cast<float>(x));
      case DType::F64:
        return put(i, x);
      case DType::I32:
        return put(i, static_cast<std::int32_t>(x));
      case DType::BF16:
        return put(i, bf16_bits(static_cast<float>(x)));
      case DType::U8:
        return put(i, static_cast<std::uint8_t>(x));
      default:
        FAIL() << "no such buffer";
    }
  }
  double operator[](std::int64_t i) const {
    switch (dtype_) {
      case DType::F32:
        return get<float>(i);
      case DType::F64:
        return get<double>(i);
      case DType::U8:
        return get<std::uint8_t>(i);
      case DType::BF16: {
        const std::uint32_t bits = static_cast<std::uint32_t>(get<std::uint16_t>(i)) << 16;
        float x = 0;
        std::memcpy(&x, &bits, sizeof(x));
        return x;
      }
      default:
        return get<std::int32_t>(i);
    }
  }
  DType dtype() const { return dtype_; }
  View view() { return {bytes_.data(), size_, dtype_}; }
  ConstView view() const { return {bytes_.data(), size_, dtype_}; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  template <typename T>
  void put(std::int64_t i, T x) {
    std::memcpy(bytes_.data() + static_cast<std::size_t>(i) * sizeof(T), &x, sizeof(T));
  }
  template <typename T>
  double get(std::int64_t i) const {
    T x;
    std::memcpy(&x, bytes_.data() + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
    return static_cast<double>(x);
  }
  /// Rounds to the nearest, ties to even; NaN stays NaN.
  static std::uint16_t bf16_bits(float x) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof(bits));
    if (x != x) return static_cast<std::uint16_t>(bits >> 16 | 0x40U);
    return static_cast<std::uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
  }
  DType dtype_;
  std::int64_t size_;
  std::vector<unsigned char> bytes_;
};

inline Buffer random(DType dtype, std::int64_t n, unsigned seed, double scale = 1.0) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0.0, scale);
  Buffer b(dtype, n);
  for (std::int64_t i = 0; i < n; ++i) b.set(i, normal(engine));
  return b;
}

inline Buffer integers(const std::vector<double>& values) { return {DType::I32, values}; }

/// Every second row or so of `rows`, ascending, of which there are `count`.
inline Buffer some_rows(std::int64_t rows, std::int64_t count) {
  Buffer b(DType::I32, count);
  for (std::int64_t i = 0; i < count; ++i) {
    // NOLINTNEXTLINE(bugprone-integer-division): a row is a whole number
    b.set(i, static_cast<double>(i * rows / count));
  }
  return b;
}

struct Case {
  std::string isa;
  DType dtype;
  std::string str() const { return isa + "_" + name_of(dtype); }
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.str(); }
};

class KernelSuite : public ::testing::TestWithParam<Case> {
 protected:
  DType dtype() const { return GetParam().dtype; }
  bool is_double() const { return dtype() == DType::F64; }
  /// The tolerance of one rounding's worth of `ulps`.
  double tolerance(double ulps = 16) const { return ulps * (is_double() ? 2.3e-16 : 1.2e-7); }

  std::unique_ptr<Backend> backend(int threads = 2) const {
    setenv("FATHOM_ISA", GetParam().isa.c_str(), 1);
    auto b = make_cpu_backend({}, threads);
    unsetenv("FATHOM_ISA");
    return b;
  }

  /// Runs `body` with 1, 2 and 3 threads and expects bit-equal outputs.
  void on_threads(const std::function<std::vector<Buffer>(Backend&)>& body) const {
    std::vector<Buffer> first;
    for (int threads = 1; threads <= 3; ++threads) {
      std::vector<Buffer> outputs = body(*backend(threads));
      if (threads == 1) first = outputs;
      ASSERT_EQ(first.size(), outputs.size());
      for (std::size_t i = 0; i < outputs.size(); ++i) {
        EXPECT_EQ(first[i].bytes(), outputs[i].bytes())
            << "output " << i << " with " << threads << " threads";
      }
    }
  }

  void expect_close(const Buffer& got, const std::vector<double>& expected, double relative,
                    const char* what) const {
    ASSERT_EQ(got.size(), static_cast<std::int64_t>(expected.size())) << what;
    double largest = 1;
    for (const double e : expected) largest = std::isfinite(e) ? std::max(largest, std::fabs(e)) : largest;
    for (std::int64_t i = 0; i < got.size(); ++i) {
      const double e = expected[static_cast<std::size_t>(i)];
      if (std::isnan(e)) {
        EXPECT_TRUE(std::isnan(got[i])) << what << "[" << i << "]";
      } else {
        ASSERT_NEAR(got[i], e, relative * largest) << what << "[" << i << "] of " << got.size();
      }
    }
  }

  /// Expects an InternalError that names the op and says what is wrong.
  static void expect_error(const std::function<void()>& call, const std::string& op,
                           const std::string& word) {
    try {
      call();
      ADD_FAILURE() << op << " did not throw";
    } catch (const InternalError& e) {
      EXPECT_NE(std::string(e.what()).find("[" + op), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    }
  }
};

inline std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    setenv("FATHOM_ISA", isa, 1);
    try {
      make_cpu_backend({}, 1);
      all.push_back({isa, DType::F32});
      all.push_back({isa, DType::F64});
    } catch (const UserError&) {  // this machine or build lacks it
    }
    unsetenv("FATHOM_ISA");
  }
  return all;
}

inline std::string name_of_case(const ::testing::TestParamInfo<Case>& info) { return info.param.str(); }

struct RowsWidth {
  std::int64_t rows, width;
};
inline const std::vector<RowsWidth>& shapes() {
  static const std::vector<RowsWidth> all = [] {
    std::vector<RowsWidth> s;
    for (const std::int64_t rows : {1, 5, 130}) {
      for (const std::int64_t width : {1, 3, 17, 64, 100}) s.push_back({rows, width});
    }
    s.push_back({0, 7});
    return s;
  }();
  return all;
}

inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

}  // namespace fathom::kernel_test
