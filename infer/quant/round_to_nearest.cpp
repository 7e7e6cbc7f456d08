#include "infer/quant/round_to_nearest.h"

#include <cmath>
#include <limits>
#include <vector>

#include <fmt/format.h>

#include "infer/pieces.h"
#include "kernels/error.h"

namespace fathom {

namespace {

constexpr int kClipSteps = 64, kLeastClip = 8;  // of kClipSteps

/// 0 where no float is the scale.
float scale_for(double most, double clip, int bits) {
  const double codes = static_cast<double>((1 << (bits - 1)) - 1);
  // What the lowest code stands for has to be a float as well.
  const double largest = static_cast<double>(std::numeric_limits<float>::max()) / (codes + 1);
  return static_cast<float>(std::min(largest, most * clip / codes));
}

double squared_error(std::span<const double> w, float scale, int bits, std::span<const double> importance) {
  const double inverse = 1.0 / static_cast<double>(scale);
  double sum = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    const double difference = w[i] - static_cast<double>(scale) * code_of(w[i], inverse, bits);
    sum += (importance.empty() ? 1.0 : importance[i]) * difference * difference;
  }
  return sum;
}

}  // namespace

float scale_of(std::span<const double> w, int bits, Clip clip, std::span<const double> importance) {
  double most = 0;
  for (const double v : w) most = std::max(most, std::abs(v));
  float best = scale_for(most, 1, bits);
  if (!(best > 0)) return 1;
  if (clip == Clip::None) return best;
  const bool weighted = clip == Clip::Weighted &&
                        std::any_of(importance.begin(), importance.end(), [](double h) { return h > 0; });
  const std::span<const double> of = weighted ? importance : std::span<const double>{};
  double least = squared_error(w, best, bits, of);
  const auto look_at = [&](double clip_at) {
    const float scale = scale_for(most, clip_at, bits);
    if (!(scale > 0)) return;
    const double error = squared_error(w, scale, bits, of);
    if (error < least) {
      least = error;
      best = scale;
    }
  };
  look_at(1 - 1.0 / (1 << (bits - 1)));
  for (int step = kClipSteps - 1; step >= kLeastClip && least > 0; --step)
    look_at(static_cast<double>(step) / kClipSteps);
  return best;
}

void check_weights(std::span<const float> w, std::int64_t rows, std::int64_t columns) {
  if (static_cast<std::int64_t>(w.size()) != rows * columns)
    throw InternalError(fmt::format("[quantize] {} weights for {} x {}", w.size(), rows, columns));
  for (std::size_t i = 0; i < w.size(); ++i) {
    if (!std::isfinite(w[i]))
      throw UserError(
          fmt::format("The weight at row {}, column {} of a matrix of {} x {} is {}.",
                      static_cast<std::int64_t>(i) / columns, static_cast<std::int64_t>(i) % columns, rows,
                      columns, w[i]),
          "Only finite weights can be quantized; take a checkpoint from before the run diverged.");
  }
}

QuantizedMatrix round_to_nearest(std::span<const float> w, std::int64_t rows, std::int64_t columns,
                                 const WeightFormat& format, std::span<const double> importance) {
  QuantizedMatrix q{.rows = rows,
                    .columns = columns,
                    .bits = format.bits,
                    .group = format.group_of(columns),
                    .codes = {},
                    .scales = {}};
  check_quantized_format(rows, columns, q.bits, q.group);
  check_weights(w, rows, columns);
  if (format.clip == Clip::Weighted && static_cast<std::int64_t>(importance.size()) != columns)
    throw InternalError(
        fmt::format("[round_to_nearest] importance of {} columns, not of {}", importance.size(), columns));
  q.codes.resize(w.size());
  q.scales.resize(static_cast<std::size_t>(rows * q.groups()));

  const auto group = static_cast<std::size_t>(q.group), width = static_cast<std::size_t>(columns);
  for_pieces(rows * q.groups(), std::max<std::int64_t>(1, 16384 / q.group), [&](auto begin, auto end) {
    std::vector<double> values(group);
    for (auto g = static_cast<std::size_t>(begin); g < static_cast<std::size_t>(end); ++g) {
      const std::size_t first = g * group;
      std::copy_n(w.begin() + static_cast<std::ptrdiff_t>(first), group, values.begin());
      const std::span<const double> of =
          format.clip == Clip::Weighted ? importance.subspan(first % width, group) : importance;
      const float scale = scale_of(values, q.bits, format.clip, of);
      q.scales[g] = scale;
      for (std::size_t i = 0; i < group; ++i)
        q.codes[first + i] = code_of(values[i], 1.0 / static_cast<double>(scale), q.bits);
    }
  });
  return q;
}

}  // namespace fathom
