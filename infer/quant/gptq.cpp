#include "infer/quant/gptq.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "infer/pieces.h"
#include "infer/quant/block_product.h"
#include "infer/quant/inverse_cholesky.h"
#include "kernels/error.h"

namespace fathom {

namespace {

constexpr std::int64_t kBlock = 128;      // columns
constexpr std::int64_t kRowsAtOnce = 64;  // they share a reading of U
constexpr double kLeastRaised = 0.01;
constexpr int kRaises = 3;

std::string failure_of(const Hessian& h) {
  if (h.tokens() == 0) return "its Hessian has seen no token";
  for (std::int64_t i = 0; i < h.columns(); ++i) {
    for (std::int64_t j = i; j < h.columns(); ++j) {
      if (!std::isfinite(h.at(i, j)))
        return fmt::format("its Hessian has {} at row {}, column {}", h.at(i, j), i, j);
    }
    if (h.at(i, i) < 0) return fmt::format("its Hessian has {} on the diagonal at {}", h.at(i, i), i);
  }
  return "";
}

/// The factor U of the damped Hessian, its columns in the order given; empty where it has none.
std::vector<double> inverse_factor(const Hessian& h, const std::vector<std::int64_t>& order, double damping) {
  const std::int64_t n = h.columns();
  // Of the columns that are used: how many are not does not count.
  double sum = 0;
  std::int64_t used = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    sum += h.at(i, i);
    used += h.at(i, i) > 0 ? 1 : 0;
  }
  const double mean = used > 0 ? sum / static_cast<double>(used) : 1;
  std::vector<double> u(static_cast<std::size_t>(n * n));
  for_pieces(n, 16, [&](auto begin, auto end) {
    for (auto i = begin; i < end; ++i) {
      const std::int64_t from = order[static_cast<std::size_t>(i)];
      double* row = u.data() + i * n;
      for (std::int64_t j = 0; j < n; ++j) row[j] = h.at(from, order[static_cast<std::size_t>(j)]);
      row[i] = (row[i] > 0 ? row[i] : mean) + damping * mean;
    }
  });
  if (!inverse_cholesky(u, n)) u.clear();
  return u;
}

/// Rounds rows of a matrix; what all rows share.
class RowRounder {
 public:
  RowRounder(std::span<const float> w, const WeightFormat& format, const std::vector<double>& factor,
             const std::vector<std::int64_t>& order, const std::vector<double>& importance, bool scales_first,
             QuantizedMatrix& q)
      : w_(w),
        clip_(format.clip),
        u_(factor),
        order_(order),
        importance_(importance),
        scales_first_(scales_first),
        q_(q) {}

  /// False where a weight grew beyond all numbers.
  bool rows(std::int64_t begin, std::int64_t end) const {
    const std::int64_t n = q_.columns, count = end - begin;
    std::vector<double> tile(static_cast<std::size_t>(count * n));  // the weights, in the order of `order`
    std::vector<double> errors(static_cast<std::size_t>(kBlock * count));  // [column of the block][row]
    for (std::int64_t r = 0; r < count; ++r) {
      const float* from = w_.data() + (begin + r) * n;
      if (scales_first_) find_scales(begin + r, std::vector<double>(from, from + n));
      for (std::int64_t c = 0; c < n; ++c) tile[at(r, c)] = from[order_[static_cast<std::size_t>(c)]];
    }
    for (std::int64_t first = 0; first < n;) {
      const std::int64_t last = end_of_block(first);
      for (std::int64_t r = 0; r < count; ++r) {
        if (!row_of_block(begin + r, std::span(tile).subspan(at(r, 0), static_cast<std::size_t>(n)), first,
                          last, errors.data() + r, count))
          return false;
      }
      block_product(Sign::Subtract, tile.data() + last, n, errors.data(), count, u_.data() + first * n + last,
                    n, count, n - last, last - first);
      first = last;
    }
    return true;
  }

 private:
  std::size_t at(std::int64_t r, std::int64_t c) const {
    return static_cast<std::size_t>(r * q_.columns + c);
  }
  /// Blocks hold whole groups, or lie in one: when a group's turn comes, its weights have had all updates.
  std::int64_t end_of_block(std::int64_t first) const {
    const std::int64_t group = q_.group;
    if (scales_first_) return std::min(first + kBlock, q_.columns);
    if (group <= kBlock) return std::min(first + kBlock / group * group, q_.columns);
    return std::min(first + kBlock, (first / group + 1) * group);
  }
  void find_scale(std::int64_t row, std::int64_t group, std::span<const double> weights) const {
    const std::span<const double> of =
        importance_.empty()
            ? std::span<const double>{}
            : std::span(importance_)
                  .subspan(static_cast<std::size_t>(group * q_.group), static_cast<std::size_t>(q_.group));
    q_.scales[static_cast<std::size_t>(row * q_.groups() + group)] = scale_of(weights, q_.bits, clip_, of);
  }
  void find_scales(std::int64_t row, const std::vector<double>& weights) const {
    const auto size = static_cast<std::size_t>(q_.group);
    for (std::int64_t g = 0; g < q_.groups(); ++g)
      find_scale(row, g, std::span(weights).subspan(static_cast<std::size_t>(g) * size, size));
  }
  /// Columns [first, last) of a row; `errors`: its element of each column's, `stride` apart.
  bool row_of_block(std::int64_t row, std::span<double> weights, std::int64_t first, std::int64_t last,
                    double* errors, std::int64_t stride) const {
    for (std::int64_t c = first; c < last; ++c) {
      const std::int64_t column = order_[static_cast<std::size_t>(c)], group = column / q_.group;
      if (!scales_first_ && c % q_.group == 0)
        find_scale(row, group,
                   weights.subspan(static_cast<std::size_t>(c), static_cast<std::size_t>(q_.group)));
      const double w = weights[static_cast<std::size_t>(c)];
      if (!std::isfinite(w)) return false;
      const double scale = q_.scales[static_cast<std::size_t>(row * q_.groups() + group)];
      const std::int8_t code = code_of(w, 1.0 / scale, q_.bits);
      q_.codes[at(row, column)] = code;
      const double* u = u_.data() + c * q_.columns;
      const double error = (w - scale * code) / u[c];
      for (std::int64_t k = c + 1; k < last; ++k) weights[static_cast<std::size_t>(k)] -= error * u[k];
      errors[(c - first) * stride] = error;
    }
    return true;
  }

  std::span<const float> w_;
  Clip clip_;
  const std::vector<double>& u_;
  const std::vector<std::int64_t>& order_;
  const std::vector<double>& importance_;
  bool scales_first_;
  QuantizedMatrix& q_;
};

void check_arguments(std::span<const float> w, std::int64_t rows, std::int64_t columns,
                     const WeightFormat& format, const Hessian& h, const GptqOptions& options) {
  check_quantized_format(rows, columns, format.bits, format.group_of(columns));
  check_weights(w, rows, columns);
  if (h.columns() != columns)
    throw InternalError(
        fmt::format("[gptq] a Hessian of {} columns for {} x {} weights", h.columns(), rows, columns));
  if (!(options.damping >= 0) || !std::isfinite(options.damping))
    throw UserError(fmt::format("A damping of {} is out of range.", options.damping),
                    "Choose a share of the Hessian's mean diagonal, such as 0.01.");
}

}  // namespace

GptqResult gptq(std::span<const float> w, std::int64_t rows, std::int64_t columns, const WeightFormat& format,
                const Hessian& h, const GptqOptions& options) {
  check_arguments(w, rows, columns, format, h, options);
  GptqResult result;
  result.failure = failure_of(h);
  if (!result.failure.empty()) return result;

  const std::vector<double> diagonal = h.diagonal();
  std::vector<std::int64_t> order(static_cast<std::size_t>(columns));
  std::iota(order.begin(), order.end(), 0);
  if (options.act_order) {
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t i, std::int64_t j) {
      return diagonal[static_cast<std::size_t>(i)] > diagonal[static_cast<std::size_t>(j)];
    });
  }
  result.damping = options.damping;
  std::vector<double> factor = inverse_factor(h, order, result.damping);
  for (int i = 0; i < kRaises && factor.empty(); ++i) {
    result.damping = std::max(kLeastRaised, 10 * result.damping);
    factor = inverse_factor(h, order, result.damping);
  }
  if (factor.empty()) {
    result.failure = fmt::format(
        "its Hessian is not positive definite, even damped by {:.3g} of its mean diagonal", result.damping);
    return result;
  }

  QuantizedMatrix& q = result.matrix;
  q = {.rows = rows,
       .columns = columns,
       .bits = format.bits,
       .group = format.group_of(columns),
       .codes = std::vector<std::int8_t>(w.size()),
       .scales = {}};
  q.scales.resize(static_cast<std::size_t>(rows * q.groups()));
  const std::vector<double> importance = format.clip == Clip::Weighted ? diagonal : std::vector<double>{};
  const RowRounder rounder(w, format, factor, order, importance, options.act_order, q);
  std::atomic<bool> finite = true;
  for_pieces(rows, kRowsAtOnce, [&](auto begin, auto end) {
    if (!rounder.rows(begin, end)) finite = false;
  });
  if (!finite) {
    result.matrix = {};
    result.failure = "its weights grew beyond all numbers";
  }
  return result;
}

QuantizedLayer quantize_matrix(std::span<const float> w, std::int64_t rows, std::int64_t columns,
                               const WeightFormat& format, const Hessian* h, const GptqOptions& options) {
  QuantizedLayer layer;
  std::vector<double> importance;
  if (h != nullptr) {
    GptqResult result = gptq(w, rows, columns, format, *h, options);
    if (result.failure.empty())
      return {.matrix = std::move(result.matrix),
              .by = Quantizer::Gptq,
              .failure = "",
              .damping = result.damping};
    layer.failure = std::move(result.failure);
    importance = h->diagonal();
  }
  WeightFormat nearest = format;
  if (nearest.clip == Clip::Weighted) {
    const bool known = !importance.empty() && std::all_of(importance.begin(), importance.end(), [](double i) {
      return std::isfinite(i) && i >= 0;
    });
    if (!known) nearest.clip = Clip::LeastSquares;
  }
  layer.matrix = round_to_nearest(w, rows, columns, nearest, importance);
  return layer;
}

}  // namespace fathom
