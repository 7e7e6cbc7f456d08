#include "kernels/hadamard.h"

#include <array>
#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {

bool is_prime(std::int64_t n) {
  if (n < 2) return false;
  for (std::int64_t d = 2; d * d <= n; ++d) {
    if (n % d == 0) return false;
  }
  return true;
}

/// A field of q elements, q a prime p or p^2: elements a + b sqrt(r), r no square, are numbered a + p b.
class Field {
 public:
  /// `q`: as is_order() says.
  explicit Field(std::int64_t q)
      : q_(q), p_(is_prime(q) ? q : std::llround(std::sqrt(static_cast<double>(q)))) {
    squares_.resize(static_cast<std::size_t>(p_));
    for (std::int64_t a = 1; a < p_; ++a) squares_[static_cast<std::size_t>(a * a % p_)] = true;
    for (root_ = 2; root_ < p_ && squares_[static_cast<std::size_t>(root_)]; ++root_) {
    }
  }
  static bool is_order(std::int64_t q) {
    const auto p = std::llround(std::sqrt(static_cast<double>(q)));
    return q % 2 == 1 && (is_prime(q) || (p * p == q && is_prime(p)));
  }
  /// 0 for x = y, else 1 where x - y is a square, and -1. In p^2 elements one is a square when its norm
  /// a^2 - r b^2 is one of the p.
  int character(std::int64_t x, std::int64_t y) const {
    const std::int64_t a = modulo(x % p_ - y % p_), b = modulo(x / p_ - y / p_);
    if (a == 0 && b == 0) return 0;
    const std::int64_t norm = q_ == p_ ? a : modulo(a * a - root_ * (b * b % p_));
    return squares_[static_cast<std::size_t>(norm)] ? 1 : -1;
  }

 private:
  std::int64_t modulo(std::int64_t x) const { return (x % p_ + p_) % p_; }

  std::int64_t q_, p_, root_ = 2;
  std::vector<bool> squares_;
};

/// The conference matrix [q+1, q+1] of a field: zero diagonal, and orthogonal rows of 1 and -1 beside it.
std::vector<int> conference(std::int64_t q) {
  const Field field(q);
  const std::int64_t n = q + 1;
  const int below = q % 4 == 3 ? -1 : 1;  // skew, or symmetric
  std::vector<int> c(static_cast<std::size_t>(n * n));
  for (std::int64_t i = 1; i < n; ++i) {
    c[static_cast<std::size_t>(i)] = 1;
    c[static_cast<std::size_t>(i * n)] = below;
    for (std::int64_t j = 1; j < n; ++j)
      c[static_cast<std::size_t>(i * n + j)] = field.character(i - 1, j - 1);
  }
  return c;
}

std::vector<std::int8_t> first_construction(std::int64_t q) {
  const std::vector<int> c = conference(q);
  const std::int64_t n = q + 1;
  std::vector<std::int8_t> h(c.begin(), c.end());
  for (std::int64_t i = 0; i < n; ++i) h[static_cast<std::size_t>(i * n + i)] = 1;
  return h;
}

std::vector<std::int8_t> second_construction(std::int64_t q) {
  constexpr int kBeside[2][2] = {{1, 1}, {1, -1}}, kDiagonal[2][2] = {{1, -1}, {-1, -1}};
  const std::vector<int> c = conference(q);
  const std::int64_t n = q + 1;
  std::vector<std::int8_t> h(static_cast<std::size_t>(4 * n * n));
  for (std::int64_t i = 0; i < 2 * n; ++i) {
    for (std::int64_t j = 0; j < 2 * n; ++j) {
      const int of = c[static_cast<std::size_t>(i / 2 * n + j / 2)];
      h[static_cast<std::size_t>(2 * n * i + j)] =
          static_cast<std::int8_t>(i / 2 == j / 2 ? kDiagonal[i % 2][j % 2] : of * kBeside[i % 2][j % 2]);
    }
  }
  return h;
}

/// Four circulant matrices of n by n whose products with their transposes add up to 4 n I. Their first rows
/// are 1 at 0 and on some of the orbits of Z_n under multiplication by a unit, those whose bits a mask has,
/// in the order of the orbits' least elements; -1 on the others. So few orbits that the masks were found by
/// trying.
struct Circulants {
  int n, unit;
  std::array<int, 4> masks;
};
constexpr Circulants kCirculants[] = {{39, 5, {173, 519, 843, 307}}, {43, 4, {21, 6, 28, 26}}};

/// Goethals and Seidel 1967: four such matrices, three of them backwards, in an array of 4 n by 4 n.
std::vector<std::int8_t> array_construction(const Circulants& of) {
  const auto n = static_cast<std::size_t>(of.n);
  std::vector<int> orbit(n, -1);
  int orbits = 0;
  for (std::size_t first = 1; first < n; ++first) {
    if (orbit[first] >= 0) continue;
    for (std::size_t x = first; orbit[x] < 0; x = x * static_cast<std::size_t>(of.unit) % n)
      orbit[x] = orbits;
    ++orbits;
  }
  // Element (i, j) of matrix m or its transpose.
  const auto circulant = [&](int m, std::size_t i, std::size_t j, bool transposed) {
    const std::size_t x = transposed ? (i + n - j) % n : (j + n - i) % n;
    return x == 0 || (of.masks[static_cast<std::size_t>(m)] >> orbit[x] & 1) != 0 ? 1 : -1;
  };
  struct Block {
    int matrix, sign;
    bool transposed;
  };
  // Off the diagonal all are backwards.
  constexpr Block kArray[4][4] = {{{0, 1, false}, {1, 1, false}, {2, 1, false}, {3, 1, false}},
                                  {{1, -1, false}, {0, 1, false}, {3, 1, true}, {2, -1, true}},
                                  {{2, -1, false}, {3, -1, true}, {0, 1, false}, {1, 1, true}},
                                  {{3, -1, false}, {2, 1, true}, {1, -1, true}, {0, 1, false}}};
  std::vector<std::int8_t> h;
  for (std::size_t i = 0; i < 4 * n; ++i) {
    for (std::size_t j = 0; j < 4 * n; ++j) {
      const Block& b = kArray[i / n][j / n];
      const std::size_t column = i / n == j / n ? j % n : n - 1 - j % n;
      h.push_back(static_cast<std::int8_t>(b.sign * circulant(b.matrix, i % n, column, b.transposed)));
    }
  }
  return h;
}

}  // namespace

std::vector<std::int8_t> hadamard_matrix(std::int64_t order) {
  if (order == 1) return {1};
  if (order == 2) return {1, 1, 1, -1};
  if (order < 4 || order % 4 != 0) return {};
  if (Field::is_order(order - 1)) return first_construction(order - 1);  // order - 1 = 3 (mod 4)
  const std::int64_t q = order / 2 - 1;
  if (q % 4 == 1 && Field::is_order(q)) return second_construction(q);
  for (const Circulants& four : kCirculants) {
    if (order == 4 * four.n) return array_construction(four);
  }
  return {};
}

HadamardTransform::HadamardTransform(std::int64_t size) : size_(size) {
  if (size < 1) throw InternalError(fmt::format("[hadamard] a transform of {} elements", size));
  constexpr std::int64_t kMostFactor = 512;  // K: its part takes n K operations
  // Of the blocks that divide the size the largest; of its splits the one with the smallest K.
  for (std::int64_t block = size; block >= 1; --block) {
    if (size % block != 0) continue;
    std::int64_t power = 1;
    while (block % (2 * power) == 0) power *= 2;
    for (; power >= 1; power /= 2) {
      if (block / power > kMostFactor) break;
      matrix_ = hadamard_matrix(block / power);
      if (matrix_.empty()) continue;
      factor_ = block / power;
      power_ = power;
      return;
    }
  }
}

void HadamardTransform::apply(std::span<double> x) const {
  if (static_cast<std::int64_t>(x.size()) != size_)
    throw InternalError(fmt::format("[hadamard] {} elements for a transform of {}", x.size(), size_));
  const double scale = 1.0 / std::sqrt(static_cast<double>(block()));
  const auto factor = static_cast<std::size_t>(factor_), power = static_cast<std::size_t>(power_);
  std::vector<double> column(factor);
  for (std::size_t first = 0; first < x.size(); first += factor * power) {
    const std::span<double> b = x.subspan(first, factor * power);
    for (std::size_t half = 1; half < power; half *= 2) {
      for (std::size_t i = 0; i < b.size(); i += 2 * half) {
        for (std::size_t j = i; j < i + half; ++j) {
          const double low = b[j], high = b[j + half];
          b[j] = low + high;
          b[j + half] = low - high;
        }
      }
    }
    for (std::size_t j = 0; j < power; ++j) {
      for (std::size_t i = 0; i < factor; ++i) {
        double sum = 0;
        for (std::size_t k = 0; k < factor; ++k) sum += matrix_[i * factor + k] * b[k * power + j];
        column[i] = sum * scale;
      }
      for (std::size_t i = 0; i < factor; ++i) b[i * power + j] = column[i];
    }
  }
}

}  // namespace fathom
