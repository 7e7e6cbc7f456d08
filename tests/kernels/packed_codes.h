// Matrices of few bits as tests write them down, and what the tests of their products run on: every
// instruction set of the CPU, and a GPU.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "kernels/packed_matrix.h"
#include "tests/kernels/cpu_backends.h"
#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {

using testing_support::backend_for;
using testing_support::isas;

/// Codes and scales as anybody would write them down.
struct Quantized {
  PackedFormat format;
  std::int64_t rows = 0;
  std::vector<std::int8_t> codes;
  std::vector<double> scales;

  double operator()(std::int64_t r, std::int64_t c) const {
    const double scale =
        static_cast<float>(scales[static_cast<std::size_t>(r * format.groups() + c / format.group)]);
    return scale * codes[static_cast<std::size_t>(r * format.columns + c)];
  }
  Buffer packed() const {
    Buffer buffer(DType::U8, rows * format.row_bytes());
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(format.code_bytes()));
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::span<const std::int8_t> row(codes.data() + r * format.columns,
                                             static_cast<std::size_t>(format.columns));
      pack_codes(bytes, row, format);
      for (std::int64_t i = 0; i < format.code_bytes(); ++i)
        buffer.set(r * format.row_bytes() + i, bytes[static_cast<std::size_t>(i)]);
    }
    return buffer;
  }
};

/// Random codes, the least among them; every fifth row is zero, every seventh has a group of scale zero.
inline Quantized random_codes(const PackedFormat& f, std::int64_t rows, unsigned seed) {
  Quantized q{f, rows, {}, {}};
  std::mt19937 generator(seed);
  const int half = 1 << (f.bits - 1);
  std::uniform_int_distribution<int> any(-half, half - 1);
  std::uniform_real_distribution<double> scale(0.01, 0.1);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < f.columns; ++c) {
      const int code = c % 6 == 0 ? -half : any(generator);
      q.codes.push_back(static_cast<std::int8_t>(r % 5 == 4 ? 0 : code));
    }
    for (std::int64_t g = 0; g < f.groups(); ++g)
      q.scales.push_back(r % 7 == 3 && g == 0 ? 0 : scale(generator));
  }
  return q;
}

struct Subject {
  std::string isa;  // "cuda": the GPU
  DType dtype;
  std::string str() const { return isa + "_" + name_of(dtype); }
  friend void PrintTo(const Subject& s, std::ostream* out) { *out << s.str(); }
};

inline std::vector<Subject> subjects() {
  std::vector<Subject> all;
  for (const std::string& isa : isas()) {
    all.push_back({isa, DType::F32});
    all.push_back({isa, DType::F64});
  }
#ifdef FATHOM_CUDA
  all.push_back({"cuda", DType::F32});
  all.push_back({"cuda", DType::BF16});
#endif
  return all;
}

/// A fixture whose tests run on a subject, and are skipped where it is not there.
class OnSubject : public ::testing::TestWithParam<Subject> {
 protected:
  void SetUp() override {
    if (GetParam().isa == "cuda") skip_without(testing_support::open_device(testing_support::Device::Cuda));
  }
  DType dtype() const { return GetParam().dtype; }
  std::shared_ptr<Backend> backend(bool invariant, int threads = 2) const {
    const std::string& isa = GetParam().isa;
    if (isa != "cuda") return backend_for(isa, threads, invariant);
    return testing_support::open_device(testing_support::Device::Cuda, {.invariant = invariant}).backend;
  }
};

}  // namespace fathom::kernel_test
