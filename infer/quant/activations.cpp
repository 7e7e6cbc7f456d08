#include "infer/quant/activations.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {

constexpr float kLargest = std::numeric_limits<float>::max();

/// To the nearest integer, ties to even, of numbers below 2^22: such sums have no fraction in fp32.
float nearest(float x) {
  constexpr float kNoFraction = 0x1.8p23F;
  return x + kNoFraction - kNoFraction;
}

void check_sizes(std::size_t elements, std::size_t codes) {
  if (elements != codes)
    throw InternalError(fmt::format("[activations] {} elements and {} codes", elements, codes));
}

void check_groups(std::size_t elements, std::int64_t group, std::size_t scales) {
  const auto n = static_cast<std::int64_t>(elements);
  if (group < 1 || n % group != 0 || static_cast<std::int64_t>(scales) != n / group)
    throw InternalError(
        fmt::format("[activations] {} scales for {} elements in groups of {}", scales, n, group));
}

void check_finite(std::span<const float> x) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(x[i]))
      throw InternalError(fmt::format("[activations] element {} of {} is {}", i, x.size(), x[i]));
  }
}

AffineScale encode_group(std::span<const float> x, int bits, float clip, std::span<std::uint8_t> codes) {
  const auto [min, max] = std::minmax_element(x.begin(), x.end());
  const float levels = static_cast<float>((1 << bits) - 1);
  // Halves first: the whole range may be no float.
  const float half = clip * (*max / 2 - *min / 2);
  AffineScale to{half / (levels / 2), *max / 2 + *min / 2 - half};
  if (!(to.scale > 0)) to = {1, *min};
  for (std::size_t i = 0; i < x.size(); ++i)
    codes[i] = static_cast<std::uint8_t>(nearest(std::clamp((x[i] - to.low) / to.scale, 0.0F, levels)));
  return to;
}

}  // namespace

void check_activation_format(const ActivationFormat& format) {
  if (format.bits != 4 && format.bits != 8)
    throw UserError(fmt::format("Activations of {} bits are not supported.", format.bits), "Choose 4 or 8.");
  if (!(format.clip > 0 && format.clip <= 1))
    throw UserError(fmt::format("Clipping activations to {} of their range is not possible.", format.clip),
                    "Choose a share above 0 and up to 1, such as 0.9.");
}

float encode_symmetric(std::span<const float> x, const ActivationFormat& format,
                       std::span<std::int8_t> codes) {
  check_activation_format(format);
  check_sizes(x.size(), codes.size());
  check_finite(x);
  const float least = -static_cast<float>(1 << (format.bits - 1)), most = -least - 1;
  float largest = 0;
  for (const float v : x) largest = std::max(largest, std::abs(v));
  float scale = std::min(largest * (static_cast<float>(format.clip) / most), kLargest / -least);
  if (!(scale > 0)) scale = 1;
  for (std::size_t i = 0; i < x.size(); ++i)
    codes[i] = static_cast<std::int8_t>(nearest(std::clamp(x[i] / scale, least, most)));
  return scale;
}

void decode_symmetric(std::span<const std::int8_t> codes, float scale, std::span<float> x) {
  check_sizes(x.size(), codes.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = scale * static_cast<float>(codes[i]);
}

void encode_asymmetric(std::span<const float> x, std::int64_t group, const ActivationFormat& format,
                       std::span<std::uint8_t> codes, std::span<AffineScale> scales) {
  check_activation_format(format);
  check_sizes(x.size(), codes.size());
  check_groups(x.size(), group, scales.size());
  check_finite(x);
  const auto size = static_cast<std::size_t>(group);
  for (std::size_t g = 0; g < scales.size(); ++g)
    scales[g] = encode_group(x.subspan(g * size, size), format.bits, static_cast<float>(format.clip),
                             codes.subspan(g * size, size));
}

void decode_asymmetric(std::span<const std::uint8_t> codes, std::int64_t group,
                       std::span<const AffineScale> scales, std::span<float> x) {
  check_sizes(x.size(), codes.size());
  check_groups(x.size(), group, scales.size());
  const auto size = static_cast<std::size_t>(group);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const AffineScale& of = scales[i / size];
    // Beyond the largest floats by a rounding of the scale, in the widest of ranges only.
    const double value = static_cast<double>(of.low) + static_cast<double>(of.scale) * codes[i];
    x[i] = static_cast<float>(std::clamp<double>(value, -kLargest, kLargest));
  }
}

}  // namespace fathom
