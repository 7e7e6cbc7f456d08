#include "infer/quant/calibrate.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "infer/pieces.h"
#include "infer/quant/key_means.h"
#include "infer/quant/product_hessians.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"

namespace fathom {

namespace {

// By all threads, and the same sums however many there are.
double relative_error(std::span<const float> w, const QuantizedMatrix& q) {
  const auto columns = static_cast<std::size_t>(q.columns), group = static_cast<std::size_t>(q.group);
  std::vector<double> errors(static_cast<std::size_t>(q.rows)), squares(errors.size());
  for_pieces(q.rows, 16, [&](auto begin, auto end) {
    for (auto r = static_cast<std::size_t>(begin); r < static_cast<std::size_t>(end); ++r) {
      for (std::size_t i = r * columns; i < (r + 1) * columns; ++i) {
        const double of = w[i],
                     error = of - static_cast<double>(q.scales[i / group] * static_cast<float>(q.codes[i]));
        squares[r] += of * of;
        errors[r] += error * error;
      }
    }
  });
  const double all = std::accumulate(squares.begin(), squares.end(), 0.0);
  return all > 0 ? std::sqrt(std::accumulate(errors.begin(), errors.end(), 0.0) / all) : 0;
}

class Calibration {
 public:
  Calibration(Context& c, const Transformer& model, const Quantization& quantization,
              std::vector<Batch> batches, const CalibrationOptions& options)
      : c_(c),
        model_(model),
        quantizer_(c, model, quantization),
        means_keys_(quantization.key_means),
        batches_(std::move(batches)),
        options_(options) {}

  CalibratedModel run() {
    const NoGrad no_grad(c_);
    if (options_.refit_thresholds) refit_ = what_to_refit(model_.routing(), options_.rule);
    if (refit_ != Refit::Nothing) {
      for (const Batch& batch : batches_) before_.add(c_, model_.forward(c_, batch, options_.rule));
    }
    for (const Batch& batch : batches_) streams_.push_back(quantizer_.model().embed(c_, batch));
    const std::int64_t depth = model_.config().depth;
    for (std::int64_t layer = 0; layer < depth; ++layer) {
      if (options_.progress) options_.progress(layer, depth);
      block(layer);
      if (means_keys_) mean_keys(layer);
      // Nothing reads the stream behind the last one but its experts' predictors.
      const Stopwatch watch;
      if (layer + 1 < depth || refits_experts()) advance(layer);
      spdlog::debug("block {}: its stream took {:.2f} s", layer + 1, watch.seconds());
    }
    if (refit_ == Refit::OneThreshold) fit_one_threshold();
    result_.quantized = quantizer_.finish();
    return std::move(result_);
  }

 private:
  bool refits_experts() const { return refit_ == Refit::Biases && model_.routing().experts_choose(); }
  double threshold() const { return std::get<Causal>(options_.rule).threshold; }

  // Later layers read what earlier ones then do with it, which one more pass would show: it is little.
  void fit_one_threshold() {
    DecidingLogits logits(Causal::Logit::Router);
    for (const Batch& batch : batches_) logits.add(c_, quantizer_.model().forward(c_, batch, options_.rule));
    RefittedThreshold fitted = logits.match_all(threshold(), before_);
    const double to = 1 / (1 + std::exp(fitted.shift - logit(threshold())));
    result_.rule = Causal{Causal::Logit::Router, to};
    fitted.layer = -1;
    result_.thresholds.push_back(fitted);
  }

  void block(std::int64_t layer) {
    // Nearly all of the arithmetic is here: where there is a GPU, it does it.
    ProductHessians hessians = c_.backend().is_cpu() ? ProductHessians() : ProductHessians(c_);
    DecidingLogits logits(Causal::Logit::Predictor);
    Stopwatch watch;
    // Where only caches have few bits, nothing is to be chosen by what products read.
    const ProductObserver observer =
        quantizer_.parameters().empty() ? ProductObserver() : hessians.observer();
    for (std::size_t i = 0; i < batches_.size(); ++i) {
      ForwardResult decided;
      model_.run_block(c_, layer, streams_[i], batches_[i], options_.rule, decided, observer);
      if (refit_ == Refit::Biases) logits.add(c_, decided);
    }
    hessians.collect();
    const double seen = watch.seconds();
    watch.restart();
    const std::string at = fmt::format("model.layers.{}.", layer);
    for (const std::string& parameter : quantizer_.parameters()) {
      if (!parameter.starts_with(at)) continue;
      quantizer_.quantize(parameter, [&](const MatrixToQuantize& m) { return quantize(m, hessians); });
    }
    spdlog::debug("block {}: what its products read took {:.2f} s, their codes {:.2f} s", layer + 1, seen,
                  watch.seconds());
    if (refit_ == Refit::Biases && model_.routing().routes(layer)) refit(logits, layer, false);
  }

  // Of the keys that the quantized block makes of its stream: those that will become codes.
  void mean_keys(std::int64_t layer) {
    const Stopwatch watch;
    KeyMeans keys(model_.config());
    for (std::size_t i = 0; i < batches_.size(); ++i) {
      ForwardResult decided;
      quantizer_.model().run_block(c_, layer, streams_[i], batches_[i], options_.rule, decided, {},
                                   [&](const Tensor& qkv) { keys.add(c_, qkv); });
    }
    quantizer_.model().set_key_means(c_, layer, keys.means());
    spdlog::debug("block {}: the mean of {} keys took {:.2f} s", layer + 1, keys.rows(), watch.seconds());
  }

  QuantizedMatrix quantize(const MatrixToQuantize& m, const ProductHessians& hessians) {
    const Hessian* const h = hessians.find(m.parameter, m.expert);
    const PackedFormat& f = m.format;
    const bool wanted = options_.by == Quantizer::Gptq;
    QuantizedLayer made = quantize_matrix(m.values, m.rows, f.columns, {.bits = f.bits, .group = f.group},
                                          wanted ? h : nullptr, options_.gptq);
    CalibratedMatrix& said = result_.matrices.emplace_back();
    said.parameter = m.parameter;
    said.expert = m.expert;
    said.rows = m.rows;
    said.columns = f.columns;
    said.tokens = h != nullptr ? h->tokens() : 0;
    said.by = made.by;
    said.failure = wanted && h == nullptr ? "no token of the calibration came to it" : made.failure;
    said.damping = made.damping;
    said.weight_error = relative_error(m.values, made.matrix);
    if (h != nullptr) said.output_error = hessians.relative_loss(m.values, made.matrix, *h);
    return std::move(made.matrix);
  }

  // The stream goes through the quantized block. Experts' predictors read it behind the block's attention, so
  // their logits are known only then, and the block is run again with what they are fitted to.
  void advance(std::int64_t layer) {
    if (refits_experts()) {
      DecidingLogits logits(Causal::Logit::Predictor);
      for (std::size_t i = 0; i < batches_.size(); ++i) {
        ForwardResult decided;
        quantizer_.model().run_block(c_, layer, streams_[i], batches_[i], options_.rule, decided);
        logits.add(c_, decided);
      }
      refit(logits, layer, true);
    }
    for (std::size_t i = 0; i < batches_.size(); ++i) {
      ForwardResult decided;
      streams_[i] = quantizer_.model().run_block(c_, layer, streams_[i], batches_[i], options_.rule, decided);
    }
  }

  void refit(const DecidingLogits& logits, std::int64_t layer, bool of_experts) {
    for (const RefittedThreshold& r :
         logits.refit(c_, quantizer_.model(), layer, of_experts, threshold(), before_))
      result_.thresholds.push_back(r);
  }

  Context& c_;
  const Transformer& model_;
  ModelQuantizer quantizer_;
  bool means_keys_;
  std::vector<Batch> batches_;
  const CalibrationOptions& options_;
  Refit refit_ = Refit::Nothing;
  DecisionCounts before_;
  std::vector<Tensor> streams_;  // by batch, before the block at hand
  CalibratedModel result_;
};

}  // namespace

std::vector<Batch> calibration_batches(Context& c, std::span<const std::int32_t> tokens, std::int64_t seq) {
  constexpr std::int64_t kRows = 4096;
  const std::int64_t sequences = seq > 0 ? std::ssize(tokens) / seq : 0;
  if (sequences == 0)
    throw InternalError(fmt::format("[calibrate] {} tokens are no sequence of {}", tokens.size(), seq));
  const std::int64_t at_once = std::max<std::int64_t>(1, kRows / seq);
  std::vector<Batch> batches;
  for (std::int64_t first = 0; first < sequences; first += at_once) {
    const std::int64_t n = std::min(at_once, sequences - first);
    const auto begin = tokens.begin() + first * seq;
    batches.push_back(make_batch(c, n, seq, {begin, begin + n * seq}, {}));
  }
  return batches;
}

CalibratedModel quantize_calibrated(Context& c, const Transformer& model, const Quantization& quantization,
                                    std::span<const std::int32_t> tokens, const CalibrationOptions& options) {
  return Calibration(c, model, quantization, calibration_batches(c, tokens, options.seq), options).run();
}

}  // namespace fathom
