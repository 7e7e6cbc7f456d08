// Rotary positions of models whose context was made longer than the one they were trained in at first.
#pragma once

#include <compare>
#include <cstdint>

namespace fathom {

/// Linear (Chen et al. 2023, arXiv 2306.15595): every wavelength becomes `factor` times as long. Llama3
/// (Grattafiori et al. 2024, arXiv 2407.21783): only the long ones do.
enum class RopeScalingKind { None, Linear, Llama3 };

struct RopeScaling {
  RopeScalingKind kind = RopeScalingKind::None;
  double factor = 1.0;
  // Llama3: wavelengths above original_max_seq_len / low_freq_factor become longer, those below
  // original_max_seq_len / high_freq_factor stay, and those between change from the one to the other with the
  // turns that they make in a sequence.
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  std::int64_t original_max_seq_len = 8192;  // tokens

  bool operator==(const RopeScaling&) const = default;
  auto operator<=>(const RopeScaling&) const = default;
};

/// What an inverse frequency, in radians a position, becomes. The same number for every backend.
double scaled_frequency(double frequency, const RopeScaling& scaling);

}  // namespace fathom
