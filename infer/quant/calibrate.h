// A model of few bits by GPTQ (Frantar et al. 2022, arXiv 2210.17323, section 4), block by block: what a
// block's products read is shown by the model whose blocks before it are quantized already, so that they make
// up for what those lost, of rows of few bits too. The four products of a block, and its experts, see one
// pass of its own numbers, behind their transforms and before they become codes.
//
// Where keys are to become codes without their mean, the quantized block makes them once before, for the
// mean.
//
// Cost: beside the quantizer's, two passes of each block over the calibration tokens, a third one for the
// mean of keys, and one of all blocks where thresholds are fitted again. Memory: 4 tokens width bytes for the
// stream between two blocks, and a Hessian of each of the block's products and experts.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "infer/quant/gptq.h"
#include "infer/quant/quantize_model.h"
#include "infer/quant/refit.h"

namespace fathom {

struct CalibrationOptions {
  SelectionRule rule = TopK{};  // how routed blocks and experts choose, now and when the model serves
  std::int64_t seq = 0;         // tokens of a sequence
  Quantizer by = Quantizer::Gptq;
  GptqOptions gptq = {};
  bool refit_thresholds = false;  // refit.h
  /// Called before each block, `done` of `blocks`.
  std::function<void(std::int64_t done, std::int64_t blocks)> progress = {};
};

/// What became of one matrix, a whole parameter or one expert's part of it.
struct CalibratedMatrix {
  std::string parameter;
  std::int64_t expert = 0;  // 0 where there are none
  std::int64_t rows = 0, columns = 0;
  std::int64_t tokens = 0;  // of the calibration, that it read
  Quantizer by = Quantizer::RoundToNearest;
  std::string failure;      // why GPTQ was wanted and is not `by`, as the end of a sentence
  double damping = 0;       // of GPTQ
  double weight_error = 0;  // root of the squared errors' sum over that of the weights' squares
  double output_error = 0;  // tr((W - Q) H (W - Q)^T) / tr(W H W^T); 0 without a token

  /// Its Hessian has no full rank: GPTQ works by its damping alone where nothing was read.
  bool has_few_tokens() const { return tokens < columns; }
};

struct CalibratedModel {
  QuantizedModel quantized;
  std::vector<CalibratedMatrix> matrices;  // in the order of a forward pass, experts of a parameter ascending
  std::vector<RefittedThreshold> thresholds;  // of predictors: their biases are shifted
  /// Where routers decide by their own logits: the rule whose one threshold was fitted, to be the config's.
  std::optional<Causal> rule;
};

/// `model` has its masters; `tokens` are sequences of `seq`, and what is left over is not read. UserError: as
/// quantize_model() and gptq(). InternalError: not one sequence.
CalibratedModel quantize_calibrated(Context& c, const Transformer& model, const Quantization& quantization,
                                    std::span<const std::int32_t> tokens, const CalibrationOptions& options);

/// Whole sequences in batches of some 4096 tokens.
std::vector<Batch> calibration_batches(Context& c, std::span<const std::int32_t> tokens, std::int64_t seq);

}  // namespace fathom
