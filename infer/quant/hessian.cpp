#include "infer/quant/hessian.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "infer/pieces.h"
#include "infer/quant/block_product.h"
#include "kernels/error.h"

namespace fathom {

namespace {

constexpr std::int64_t kTile = 128;          // columns
constexpr std::int64_t kTokensAtOnce = 128;  // a run of block_product's sums

}  // namespace

Hessian::Hessian(std::int64_t columns) : columns_(columns) {
  if (columns < 1) throw InternalError(fmt::format("[hessian] {} columns", columns));
  sum_.resize(static_cast<std::size_t>(columns * columns));
}

Hessian::Hessian(std::int64_t columns, std::vector<double> sum, std::int64_t tokens)
    : columns_(columns), tokens_(tokens), sum_(std::move(sum)) {
  if (columns < 1 || static_cast<std::int64_t>(sum_.size()) != columns * columns)
    throw InternalError(fmt::format("[hessian] {} elements for {} columns", sum_.size(), columns));
}

void Hessian::add(std::span<const float> x, std::span<const float> gates) {
  const auto elements = static_cast<std::int64_t>(x.size()), n = columns_, tokens = elements / n;
  if (elements % n != 0 || (!gates.empty() && static_cast<std::int64_t>(gates.size()) != tokens))
    throw InternalError(
        fmt::format("[hessian] {} inputs and {} gates for {} columns", elements, gates.size(), n));
  std::vector<double> scaled(static_cast<std::size_t>(std::min(kTokensAtOnce, tokens) * n));
  std::vector<std::pair<std::int64_t, std::int64_t>> tiles;  // of the upper triangle
  for (std::int64_t i = 0; i < n; i += kTile) {
    for (std::int64_t j = i; j < n; j += kTile) tiles.emplace_back(i, j);
  }
  for (std::int64_t first = 0; first < tokens; first += kTokensAtOnce) {
    const std::int64_t count = std::min(kTokensAtOnce, tokens - first);
    for (std::int64_t t = 0; t < count; ++t) {
      const double gate = gates.empty() ? 1.0 : gates[static_cast<std::size_t>(first + t)];
      for (std::int64_t c = 0; c < n; ++c)
        scaled[static_cast<std::size_t>(t * n + c)] = gate * x[static_cast<std::size_t>((first + t) * n + c)];
    }
    for_pieces(static_cast<std::int64_t>(tiles.size()), 1, [&](auto begin, auto end) {
      for (auto tile = begin; tile < end; ++tile) {
        const auto [i, j] = tiles[static_cast<std::size_t>(tile)];
        block_product(Sign::Add, sum_.data() + i * n + j, n, scaled.data() + i, n, scaled.data() + j, n,
                      std::min(kTile, n - i), std::min(kTile, n - j), count);
      }
    });
  }
  tokens_ += tokens;
}

void Hessian::merge(const Hessian& other) {
  if (other.columns_ != columns_)
    throw InternalError(fmt::format("[hessian] {} and {} columns", columns_, other.columns_));
  for (std::size_t i = 0; i < sum_.size(); ++i) sum_[i] += other.sum_[i];
  tokens_ += other.tokens_;
}

// By all threads: of a wide product these are some 10^7 numbers, several times a block.
void Hessian::add_sum(std::span<const float> sum, std::int64_t tokens) {
  if (sum.size() != sum_.size())
    throw InternalError(fmt::format("[hessian] {} elements for {} columns", sum.size(), columns_));
  for_pieces(columns_, 64, [&](auto begin, auto end) {
    for (auto i = static_cast<std::size_t>(begin * columns_); i < static_cast<std::size_t>(end * columns_);
         ++i)
      sum_[i] += static_cast<double>(sum[i]);
  });
  tokens_ += tokens;
}

std::vector<double> Hessian::diagonal() const {
  std::vector<double> of;
  for (std::int64_t i = 0; i < columns_; ++i) of.push_back(at(i, i));
  return of;
}

namespace {

constexpr std::int64_t kRowsAtOnce = 64;  // they share a reading of H

/// x H x^T of `count` rows x: xs[column][row].
void add_losses(const Hessian& h, std::span<const double> xs, std::int64_t count, std::span<double> losses) {
  const std::int64_t n = h.columns();
  // Twice what is above H's diagonal and half of it.
  std::vector<double> tile(kTile * kTile), products(static_cast<std::size_t>(count * kTile));
  for (std::int64_t j = 0; j < n; j += kTile) {
    const std::int64_t width = std::min(kTile, n - j);
    std::fill(products.begin(), products.end(), 0.0);
    for (std::int64_t i = 0; i <= j; i += kTile) {
      const std::int64_t height = std::min(kTile, n - i);
      for (std::int64_t k = 0; k < height; ++k) {
        double* const to = tile.data() + k * width;
        // Tiles above the diagonal's are there as they are.
        const std::int64_t own = i + k - j;
        for (std::int64_t l = 0; l < std::min(own, width); ++l) to[l] = 0;
        for (std::int64_t l = std::max<std::int64_t>(0, own); l < width; ++l) to[l] = h.at(i + k, j + l);
        if (own >= 0 && own < width) to[own] *= 0.5;
      }
      block_product(Sign::Add, products.data(), width, xs.data() + i * count, count, tile.data(), width,
                    count, width, height);
    }
    for (std::int64_t r = 0; r < count; ++r) {
      double sum = 0;
      for (std::int64_t l = 0; l < width; ++l)
        sum += products[static_cast<std::size_t>(r * width + l)] *
               xs[static_cast<std::size_t>((j + l) * count + r)];
      losses[static_cast<std::size_t>(r)] += 2 * sum;
    }
  }
}

/// Those of W's rows, where they are wanted, and of (W - Q)'s.
struct Losses {
  double all = 0, lost = 0;
};

Losses losses_of(std::span<const float> w, const QuantizedMatrix& q, const Hessian& h, bool wants_all) {
  check(q);
  const std::int64_t rows = q.rows, n = q.columns;
  if (static_cast<std::int64_t>(w.size()) != rows * n || h.columns() != n)
    throw InternalError(fmt::format("[quantization_loss] {} weights, a Hessian of {}, {} x {}", w.size(),
                                    h.columns(), rows, n));
  std::vector<double> all(static_cast<std::size_t>(rows)), lost(static_cast<std::size_t>(rows));
  for_pieces(rows, kRowsAtOnce, [&](auto begin, auto end) {
    // Both kinds of rows side by side: they share what is read of H.
    const std::int64_t count = end - begin, width = wants_all ? 2 * count : count;
    std::vector<double> xs(static_cast<std::size_t>(n * width)), losses(static_cast<std::size_t>(width));
    for (auto r = begin; r < end; ++r) {
      for (std::int64_t c = 0; c < n; ++c) {
        const auto i = static_cast<std::size_t>(r * n + c);
        const double scale = q.scales[static_cast<std::size_t>(r * q.groups() + c / q.group)];
        double* const to = xs.data() + c * width + r - begin;
        to[0] = static_cast<double>(w[i]) - scale * q.codes[i];
        if (wants_all) to[count] = w[i];
      }
    }
    add_losses(h, xs, width, losses);
    for (std::int64_t r = 0; r < count; ++r) {
      lost[static_cast<std::size_t>(begin + r)] = losses[static_cast<std::size_t>(r)];
      if (wants_all) all[static_cast<std::size_t>(begin + r)] = losses[static_cast<std::size_t>(count + r)];
    }
  });
  Losses sums;
  for (const double of_row : all) sums.all += of_row;
  for (const double of_row : lost) sums.lost += of_row;
  return sums;
}

}  // namespace

double quantization_loss(std::span<const float> w, const QuantizedMatrix& q, const Hessian& h) {
  return losses_of(w, q, h, false).lost;
}

double relative_loss(std::span<const float> w, const QuantizedMatrix& q, const Hessian& h) {
  const Losses l = losses_of(w, q, h, true);
  return l.all > 0 ? l.lost / l.all : 0;
}

}  // namespace fathom
