// The quantization_config of config.json, to and from Quantization (docs/formats.md). Private to src/model.
#pragma once

#include <string>

#include "src/model/quantization.h"

namespace fathom {

/// The JSON object's text.
std::string print_quantization(const Quantization& q);

/// `path` names the file in errors. UserError: quantized by another program, of another version, or a key
/// that is missing or out of range.
Quantization parse_quantization(const std::string& json, const std::string& path);

}  // namespace fathom
