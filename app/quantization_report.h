// What `quantize` says of a calibrated quantization: a file in the folder, and a table.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "app/calibration.h"
#include "infer/quant/calibrate.h"
#include "infer/quant/compare.h"

namespace fathom::app {

struct QuantizationReport {
  Quantization quantization;
  Quantizer wanted = Quantizer::Gptq;
  GptqOptions gptq = {};
  CalibrationTokens calibration;
  CalibratedModel made;  // without the model
  ModelComparison compared;
  bool wants_refit = false;
  Refit refit = Refit::Nothing;
  double bytes_before = 0;

  /// quantization_report.json, of weights of so many bytes. No dates, no paths: the same work, the same
  /// bytes.
  nlohmann::ordered_json json(double bytes) const;
  std::string table() const;
  /// A sentence each, naming what saw few tokens, fell back or could not be fitted.
  std::vector<std::string> warnings() const;
  /// What was done in another way than by layer, and why.
  std::vector<std::string> notes() const;
};

}  // namespace fathom::app
