#include "src/model/quantization.h"

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

double default_activation_clip(int bits) { return bits == 4 ? 0.9 : 1.0; }

std::string product_kind(const ParameterSpec& spec) {
  const Quantization all;
  for (const std::string& kind : all.kinds) {
    if (spec.name.ends_with("." + kind + ".weight")) return kind;
  }
  return "";
}

bool Quantization::holds(const ParameterSpec& spec) const {
  return has_packed_weights() && kinds.contains(product_kind(spec));
}

PackedFormat Quantization::format(const ParameterSpec& spec) const {
  const std::int64_t columns = spec.shape[-1];
  if (group < 0 || (group > 0 && columns % group != 0)) {
    throw UserError(
        fmt::format("{} has rows of {} columns, which groups of {} do not divide.", spec.name, columns,
                    group),
        "Take a group that divides the width, the heads' values and the MLP's hidden width, or 0: one "
        "scale a row.");
  }
  constexpr std::int64_t kMostOfCodes = 65535;  // whose sums 32 bits hold (Backend::linear_codes_forward)
  if (activations < 16 && columns > kMostOfCodes) {
    throw UserError(fmt::format("{} has rows of {} columns, and products of rows of {} bits go up to {}.",
                                spec.name, columns, activations, kMostOfCodes),
                    "Leave its activations numbers (16 bits).");
  }
  return {bits, columns, group > 0 ? group : columns};
}

}  // namespace fathom
