#include "infer/quant/inverse_cholesky.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include <fmt/format.h>

#include "infer/pieces.h"
#include "infer/quant/block_product.h"
#include "kernels/error.h"

namespace fathom {

namespace {

constexpr std::int64_t kBlock = 64, kTile = 128;

/// a = L L^T of a block, L in its lower triangle.
bool factor_block(double* a, std::int64_t row, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) {
    for (std::int64_t i = j; i < n; ++i) {
      double sum = a[i * row + j];
      for (std::int64_t k = 0; k < j; ++k) sum -= a[i * row + k] * a[j * row + k];
      if (i == j) {
        if (!(sum > 0) || !std::isfinite(sum)) return false;
        a[j * row + j] = std::sqrt(sum);
      } else {
        a[i * row + j] = sum / a[j * row + j];
      }
    }
  }
  return true;
}

/// L in the lower triangle of a, which alone is read: a block of columns, then what lies right of it.
bool factor(double* a, std::int64_t n) {
  std::vector<double> turned(static_cast<std::size_t>(kBlock * n));  // the block's columns below it, as rows
  for (std::int64_t k = 0; k < n; k += kBlock) {
    const std::int64_t width = std::min(kBlock, n - k), below = k + width, left = n - below;
    double* block = a + k * n + k;
    if (!factor_block(block, n, width)) return false;
    for_pieces(left, 32, [&](auto begin, auto end) {
      for (auto i = begin; i < end; ++i) {
        double* row = a + (below + i) * n + k;
        for (std::int64_t j = 0; j < width; ++j) {
          double sum = row[j];
          for (std::int64_t t = 0; t < j; ++t) sum -= row[t] * block[j * n + t];
          row[j] = sum / block[j * n + j];
          turned[static_cast<std::size_t>(j * left + i)] = row[j];
        }
      }
    });
    std::vector<std::pair<std::int64_t, std::int64_t>> tiles;
    for (std::int64_t i = 0; i < left; i += kTile) {
      for (std::int64_t j = 0; j <= i; j += kTile) tiles.emplace_back(i, j);
    }
    for_pieces(static_cast<std::int64_t>(tiles.size()), 1, [&](auto begin, auto end) {
      for (auto tile = begin; tile < end; ++tile) {
        const auto [i, j] = tiles[static_cast<std::size_t>(tile)];
        block_product(Sign::Subtract, a + (below + i) * n + below + j, n, turned.data() + i, left,
                      turned.data() + j, left, std::min(kTile, left - i), std::min(kTile, left - j), width);
      }
    });
  }
  return true;
}

/// L^-1 of a block, [n][n], turned: [column][row].
void invert_block(double* turned, const double* l, std::int64_t row, std::int64_t n) {
  std::fill_n(turned, n * n, 0.0);
  for (std::int64_t j = 0; j < n; ++j) {
    double* x = turned + j * n;
    x[j] = 1.0 / l[j * row + j];
    for (std::int64_t i = j + 1; i < n; ++i) {
      double sum = 0;
      for (std::int64_t k = j; k < i; ++k) sum += l[i * row + k] * x[k];
      x[i] = -sum / l[i * row + i];
    }
  }
}

/// X = L^-1 in place of L, above which are zeros. A block of rows after the other, with D the block of L on
/// the diagonal: X_i = -D^-1 (sum over k < i of L_ik X_k), and D^-1 itself.
void invert(double* l, std::int64_t n) {
  std::vector<double> turned(static_cast<std::size_t>(kBlock * n)), inverse(kBlock * kBlock);
  for (std::int64_t k = 0; k < n; k += kBlock) {
    const std::int64_t height = std::min(kBlock, n - k);
    double* rows = l + k * n;
    invert_block(inverse.data(), rows + k, n, height);
    for_pieces(k, kTile, [&](auto begin, auto end) {
      for (std::int64_t i = 0; i < height; ++i) {
        for (auto j = begin; j < end; ++j) turned[static_cast<std::size_t>(j * height + i)] = rows[i * n + j];
      }
    });
    for (std::int64_t i = 0; i < height; ++i) {
      for (std::int64_t j = 0; j < height; ++j)
        rows[i * n + k + j] = inverse[static_cast<std::size_t>(j * height + i)];
    }
    for_pieces(k, kTile, [&](auto begin, auto end) {
      const std::int64_t width = end - begin;
      double sums[kBlock * kTile] = {};
      // X's rows above `begin` are zero in these columns.
      block_product(Sign::Add, sums, width, turned.data() + begin * height, height, l + begin * n + begin, n,
                    height, width, k - begin);
      for (std::int64_t i = 0; i < height; ++i) std::fill_n(rows + i * n + begin, width, 0.0);
      block_product(Sign::Subtract, rows + begin, n, inverse.data(), height, sums, width, height, width,
                    height);
    });
  }
}

/// All elements in the opposite order.
void turn_round(std::vector<double>& a) {
  const auto size = static_cast<std::int64_t>(a.size());
  for_pieces(size / 2, 1 << 16, [&](auto begin, auto end) {
    std::swap_ranges(a.begin() + begin, a.begin() + end, std::make_reverse_iterator(a.end() - begin));
  });
}

}  // namespace

bool inverse_cholesky(std::vector<double>& a, std::int64_t n) {
  if (n < 1 || static_cast<std::int64_t>(a.size()) != n * n)
    throw InternalError(fmt::format("[inverse_cholesky] {} elements for {} x {}", a.size(), n, n));
  // Backwards, Cholesky's way from the last row up is the usual one, and the upper triangle the lower.
  turn_round(a);
  if (!factor(a.data(), n)) return false;
  for_pieces(n, 64, [&](auto begin, auto end) {
    for (auto i = begin; i < end; ++i) std::fill_n(a.begin() + i * n + i + 1, n - i - 1, 0.0);
  });
  invert(a.data(), n);
  turn_round(a);
  return true;
}

}  // namespace fathom
