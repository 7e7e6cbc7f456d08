// Activations of few bits (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456, section 4, stage 2), one row or
// group at a time: what is computed while the model runs, as kernels are to give it bit by bit. All of it in
// fp32, ties to even.
//
// Symmetric, what a layer reads, a scale a token:
//   scale = max |x| * (clip / (2^(b-1) - 1)),   code = x / scale to the nearest in -2^(b-1) .. 2^(b-1) - 1.
// Asymmetric, keys and values, a scale and an offset a head:
//   half = clip * (max - min) / 2,   low = (max + min) / 2 - half,   scale = half / ((2^b - 1) / 2),
//   code = (x - low) / scale to the nearest in 0 .. 2^b - 1,   x is about low + scale * code.
// Clipping moves both ends towards the middle; where they are as far from zero as each other that is the
// paper's clip * min and clip * max, and a shift of all elements changes no code. A cache keeps both numbers
// as bf16, rounded outwards (kernels/cache_codes.h).
#pragma once

#include <cstdint>
#include <span>

namespace fathom {

struct ActivationFormat {
  int bits = 4;       // 4 or 8
  double clip = 0.9;  // above 0, up to 1; the paper's for 4 bits: 0.9, of keys and values 0.95
};

/// UserError: other bits than 4 and 8, and a clip outside (0, 1].
void check_activation_format(const ActivationFormat& format);

/// The scale of a row, and its codes. A row of zeros, or of numbers so small that no float is their scale,
/// has codes of zero and the scale 1; a scale is at most such that the lowest code stands for a float.
/// InternalError: sizes that differ, and elements that are not finite.
float encode_symmetric(std::span<const float> x, const ActivationFormat& format,
                       std::span<std::int8_t> codes);

/// x = scale * code. InternalError: sizes that differ.
void decode_symmetric(std::span<const std::int8_t> codes, float scale, std::span<float> x);

struct AffineScale {
  float scale = 1, low = 0;
};

/// Each `group` elements of a row, such as a head's: a scale and an offset [x / group], and codes. Equal
/// elements are exact: codes of zero, the scale 1. InternalError: as encode_symmetric(), and groups that do
/// not divide the row.
void encode_asymmetric(std::span<const float> x, std::int64_t group, const ActivationFormat& format,
                       std::span<std::uint8_t> codes, std::span<AffineScale> scales);

/// low + scale * code, held within the floats. InternalError: sizes that do not fit.
void decode_asymmetric(std::span<const std::uint8_t> codes, std::int64_t group,
                       std::span<const AffineScale> scales, std::span<float> x);

}  // namespace fathom
