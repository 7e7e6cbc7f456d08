// Products with weights of few bits against loops in double: on every instruction set of the CPU, and on a
// GPU.
#include <fmt/format.h>

#include "tests/kernels/packed_codes.h"

namespace fathom::kernel_test {
namespace {

class LinearPacked : public OnSubject {
 protected:
  /// Of an element, relative to the sum of its products' magnitudes.
  double tolerance() const { return dtype() == DType::F64 ? 1e-14 : dtype() == DType::F32 ? 2e-6 : 1e-2; }
  static Buffer product(Backend& b, const Buffer& x, const Quantized& w, const LinearShape& s, DType type) {
    const std::vector<Buffer> all = {
        {type, s.batch * s.rows * s.out, NAN}, x, w.packed(), {DType::F32, w.scales}};
    return run_on(b, all, [&](Backend& on, const std::vector<View>& v) {
      on.linear_packed_forward(v[0], v[1], {v[2], v[3], w.format}, s);
    })[0];
  }
  void expect_product(Backend& b, const Buffer& x, const Quantized& w, const LinearShape& s) const {
    const Buffer y = product(b, x, w, s, dtype());
    for (std::int64_t e = 0; e < s.batch; ++e) {
      for (std::int64_t r = 0; r < s.rows; ++r) {
        for (std::int64_t o = 0; o < s.out; ++o) {
          double sum = 0, size = 1e-30;
          for (std::int64_t k = 0; k < s.in; ++k) {
            const double term = x[(e * s.rows + r) * s.x_row() + k] * w(e * s.out + o, k);
            sum += term, size += std::fabs(term);
          }
          ASSERT_NEAR(y[(e * s.rows + r) * s.out + o], sum, tolerance() * size)
              << "expert " << e << " row " << r << " out " << o;
        }
      }
    }
  }
};

// Groups of whole vectors, of parts of them, of no whole word, and whole rows, which end within a vector too.
const std::vector<std::pair<std::int64_t, std::int64_t>> kColumnsAndGroups = {
    {256, 128}, {384, 128}, {256, 64},  {192, 32},  {160, 16},   {64, 8},     {60, 20},
    {15, 5},    {96, 48},   {128, 128}, {1, 1},     {3, 3},      {17, 17},    {100, 100},
    {320, 320}, {65, 65},   {704, 704}, {1060, 20}, {1536, 512}, {1031, 1031}};

TEST_P(LinearPacked, IsTheProductInDouble) {
  for (const bool invariant : {false, true}) {
    const std::shared_ptr<Backend> b = backend(invariant);
    for (const int bits : {4, 8}) {
      for (const auto& [columns, group] : kColumnsAndGroups) {
        for (const std::int64_t out : {1, 19}) {
          const Quantized w = random_codes({bits, columns, group}, out, 3);
          for (const std::int64_t rows : {1, 2, 3, 4, 7, 16, 25, 40}) {
            if ((out == 1 || columns > 1000) && rows > 4 && rows != 40) continue;
            SCOPED_TRACE(fmt::format("invariant {} bits {} columns {} group {} out {} rows {}", invariant,
                                     bits, columns, group, out, rows));
            expect_product(*b, random(dtype(), rows * columns, 5), w, {rows, columns, out});
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

// An outlier meets a code of zero in every row but the first: what it is not part of is as exact as without
// it.
TEST_P(LinearPacked, AnOutlierTouchesOnlyWhatItMeets) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t rows : {1, 6, 33}) {
      const std::int64_t in = 256, out = 9;
      Quantized w = random_codes({bits, in, 128}, out, 3);
      for (std::int64_t o = 1; o < out; ++o) w.codes[static_cast<std::size_t>(o * in + 77)] = 0;
      w.codes[77] = static_cast<std::int8_t>(-(1 << (bits - 1)));
      w.scales[5] = 1e6;  // a group beside groups of usual size
      Buffer x = random(dtype(), rows * in, 5);
      for (std::int64_t r = 0; r < rows; ++r) x.set(r * in + 77, 1e10);
      SCOPED_TRACE(fmt::format("bits {} rows {}", bits, rows));
      expect_product(*backend(false), x, w, {rows, in, out});
    }
  }
}

TEST_P(LinearPacked, ExpertsAndRowsOfAWiderMatrix) {
  for (const bool invariant : {false, true}) {
    for (const int bits : {4, 8}) {
      for (const std::int64_t rows : {1, 5, 21}) {
        for (const std::int64_t group : {32, 160}) {
          LinearShape s{rows, 160, 11, 3, 330};
          SCOPED_TRACE(fmt::format("invariant {} bits {} rows {} group {}", invariant, bits, rows, group));
          const Quantized w = random_codes({bits, s.in, group}, s.batch * s.out, 3);
          expect_product(*backend(invariant), random(dtype(), s.x_size(), 5), w, s);
        }
      }
    }
  }
}

// Whatever the number of rows and threads; and those of a product with scale * code.
TEST_P(LinearPacked, HasTheBitsOfItsNumbersInTheInvariantMode) {
  for (const int bits : {4, 8}) {
    const std::int64_t rows = 70, in = 384, out = 37;
    const Quantized w = random_codes({bits, in, 128}, out, 3);
    const Buffer x = random(dtype(), rows * in, 5);
    Buffer numbers(dtype(), out * in);
    for (std::int64_t i = 0; i < out * in; ++i) numbers.set(i, w(i / in, i % in));
    const std::shared_ptr<Backend> b = backend(true);
    const LinearShape s{rows, in, out};
    const Buffer all =
        run_on(*b, {{dtype(), rows * out}, x, numbers},
               [&](Backend& on, const std::vector<View>& v) { on.linear_forward(v[0], v[1], v[2], s); })[0];
    for (const std::int64_t count : {1, 2, 15, 16, 17, 33, 70}) {
      for (const int threads : {1, 3}) {
        Buffer some(dtype(), count * in);
        for (std::int64_t i = 0; i < some.size(); ++i) some.set(i, x[i]);
        const Buffer y = product(*backend(true, threads), some, w, {count, in, out}, dtype());
        for (std::int64_t i = 0; i < y.size(); ++i)
          ASSERT_EQ(y[i], all[i]) << bits << " bits, " << count << " rows";
      }
    }
  }
}

// More than the CPU makes numbers of at a time.
TEST_P(LinearPacked, ALargeMatrixInTiles) {
  const LinearShape s{2, 1031, 4200};
  const Quantized w = random_codes({4, s.in, s.in}, s.out, 3);
  expect_product(*backend(true), random(dtype(), s.x_size(), 5), w, s);
}

TEST_P(LinearPacked, NoRowsAndNoColumnsAreNothing) {
  const Quantized w = random_codes({4, 8, 8}, 3, 3);
  EXPECT_EQ(product(*backend(false), {dtype(), 0}, w, {0, 8, 3}, dtype()).size(), 0);
  const Quantized none = random_codes({4, 8, 8}, 0, 3);
  EXPECT_EQ(product(*backend(false), random(dtype(), 16, 1), none, {2, 8, 0}, dtype()).size(), 0);
}

TEST_P(LinearPacked, WhatDoesNotFitIsNamed) {
  const std::shared_ptr<Backend> b = backend(false);
  const auto refused = [&](const Quantized& w, const LinearShape& s, std::int64_t x_size, const char* what) {
    testing_support::expect_internal_error(
        [&] {
          product(*b, {dtype(), x_size}, w, s, dtype());
        },
        {"linear_packed_forward", what});
  };
  const LinearShape s{2, 8, 3};
  refused(random_codes({4, 8, 8}, 2, 3), s, 16, "codes");
  refused(random_codes({4, 8, 4}, 3, 3), s, 15, "x");
  refused(random_codes({4, 6, 6}, 3, 3), s, 16, "columns");
  Quantized w = random_codes({4, 8, 4}, 3, 3);
  w.scales.pop_back();
  refused(w, s, 16, "scales");
  w.format.group = 3;
  refused(w, s, 16, "group");
}

INSTANTIATE_TEST_SUITE_P(Devices, LinearPacked, ::testing::ValuesIn(subjects()),
                         [](const auto& p) { return p.param.str(); });

TEST(PackedCodes, ComeBack) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t columns : {1, 2, 7, 16, 255}) {
      const PackedFormat f{bits, columns, columns};
      const Quantized q = random_codes(f, 1, 9);
      std::vector<std::uint8_t> packed(static_cast<std::size_t>(f.code_bytes()), 0xff);
      pack_codes(packed, q.codes, f);
      std::vector<std::int8_t> back(q.codes.size());
      unpack_codes(back, packed, f);
      EXPECT_EQ(back, q.codes);
    }
  }
  const PackedFormat f{4, 3, 3};
  std::vector<std::uint8_t> packed(2);
  pack_codes(packed, std::vector<std::int8_t>{1, -2, 7}, f);
  EXPECT_EQ(packed, (std::vector<std::uint8_t>{0xe1, 0x07}));
  EXPECT_THROW(pack_codes(packed, std::vector<std::int8_t>{1, 8, 7}, f), InternalError);
  EXPECT_THROW(pack_codes(packed, std::vector<std::int8_t>{1, 7}, f), InternalError);
  EXPECT_EQ(f.row_bytes(), 64);
  EXPECT_EQ((PackedFormat{4, 129, 129}).row_bytes(), 128);
}

}  // namespace
}  // namespace fathom::kernel_test
