#include "app/quantization_report.h"

#include <algorithm>
#include <cmath>
#include <map>

#include <fmt/format.h>

namespace fathom::app {

namespace {

using Json = nlohmann::ordered_json;

const char* name_of(Quantizer q) { return q == Quantizer::Gptq ? "gptq" : "rtn"; }

bool of_experts(const CalibratedMatrix& m) { return m.parameter.find(".experts.") != std::string::npos; }

std::string described(const CalibratedMatrix& m) {
  return of_experts(m) ? fmt::format("{}, expert {}", m.parameter, m.expert) : m.parameter;
}

Json loss_json(double loss) { return {{"loss", loss}, {"perplexity", std::exp(loss)}}; }

Json matrix_json(const CalibratedMatrix& m) {
  Json json = {{"parameter", m.parameter}};
  if (of_experts(m)) json["expert"] = m.expert;
  json["rows"] = m.rows;
  json["columns"] = m.columns;
  json["tokens"] = m.tokens;
  json["quantizer"] = name_of(m.by);
  if (!m.failure.empty()) json["fell_back"] = m.failure;
  if (m.by == Quantizer::Gptq) json["damping"] = m.damping;
  json["weight_error"] = m.weight_error;
  json["output_error"] = m.output_error;
  return json;
}

// One line of the table: a parameter, and all experts' parts of it together.
struct Line {
  std::string parameter;
  std::int64_t least = 0, most = 0;  // tokens
  int by_gptq = 0, matrices = 0;
  double weight_error = 0, output_error = 0;  // sums of shares of squares
};

std::vector<Line> lines_of(const std::vector<CalibratedMatrix>& matrices) {
  std::vector<Line> lines;
  for (const CalibratedMatrix& m : matrices) {
    if (lines.empty() || lines.back().parameter != m.parameter)
      lines.push_back({m.parameter, m.tokens, m.tokens, 0, 0, 0, 0});
    Line& line = lines.back();
    line.least = std::min(line.least, m.tokens);
    line.most = std::max(line.most, m.tokens);
    line.by_gptq += m.by == Quantizer::Gptq ? 1 : 0;
    ++line.matrices;
    line.weight_error += m.weight_error * m.weight_error;
    line.output_error += m.output_error;
  }
  return lines;
}

}  // namespace

Json QuantizationReport::json(double bytes) const {
  Json json = {{"method", quantization.method},
               {"quantizer", quantization.has_packed_weights() ? name_of(wanted) : "none"},
               {"weights", quantization.bits},
               {"group", quantization.group}};
  json["activations"] = quantization.activations;
  if (quantization.activations < 16) json["activation_clip"] = quantization.activation_clip;
  json["kv"] = quantization.kv;
  json["key_means"] = quantization.key_means;
  if (quantization.rotation_seed) json["rotation_seed"] = *quantization.rotation_seed;
  if (wanted == Quantizer::Gptq) {
    json["damping"] = gptq.damping;
    json["act_order"] = gptq.act_order;
  }
  json["bytes_before"] = static_cast<std::int64_t>(bytes_before);
  json["bytes"] = static_cast<std::int64_t>(bytes);
  json["calibration"] = {{"store", calibration.store},        {"store_tokens", calibration.in_store},
                         {"sequence", calibration.seq},       {"wanted_tokens", calibration.wanted},
                         {"most_tokens", calibration.most},   {"tokens", calibration.tokens.size()},
                         {"held_out_tokens", compared.tokens}};
  json["before"] = loss_json(compared.loss_before);
  json["after"] = loss_json(compared.loss_after);
  json["matrices"] = Json::array();
  for (const CalibratedMatrix& m : made.matrices) json["matrices"].push_back(matrix_json(m));
  json["decisions"] = Json::array();
  for (const ComparedDecisions& d : compared.decisions) {
    json["decisions"].push_back({{"layer", d.layer},
                                 {"of", d.of_experts ? "experts" : "block"},
                                 {"share_before", d.share_before},
                                 {"share_after", d.share_after},
                                 {"flipped", d.flipped}});
  }
  json["thresholds"] = Json::array();
  for (const RefittedThreshold& t : made.thresholds) {
    Json of = Json::object();
    if (t.layer >= 0) of["layer"] = t.layer;
    if (t.expert >= 0) of["expert"] = t.expert;
    of["share_before"] = t.share_before;
    of["share_unfitted"] = t.share_unfitted;
    of["share_after"] = t.share_after;
    if (t.layer >= 0) {
      of["bias_shift"] = t.shift;
    } else {
      of["threshold"] = made.rule->threshold;
    }
    json["thresholds"].push_back(std::move(of));
  }
  json["notes"] = notes();
  json["warnings"] = warnings();
  return json;
}

std::vector<std::string> QuantizationReport::warnings() const {
  std::vector<std::string> all;
  for (const CalibratedMatrix& m : made.matrices) {
    if (!m.failure.empty()) {
      all.push_back(fmt::format("{} was rounded to the nearest: {}.", described(m), m.failure));
    } else if (wanted == Quantizer::Gptq && m.has_few_tokens()) {
      all.push_back(
          fmt::format("{} saw {} tokens, fewer than its {} columns: its damping ({:g}) decides much.",
                      described(m), m.tokens, m.columns, m.damping));
    }
  }
  for (const RefittedThreshold& t : made.thresholds) {
    if (t.share_before > 0 && t.share_before < 1) continue;
    all.push_back(fmt::format("layer {}{} took {} of the calibration: there was nothing to fit.", t.layer,
                              t.expert >= 0 ? fmt::format(", expert {}", t.expert) : "",
                              t.share_before > 0 ? "all" : "nothing"));
  }
  return all;
}

std::vector<std::string> QuantizationReport::notes() const {
  if (!wants_refit || refit != Refit::OneThreshold) return {};
  return {
      "Routers decide by their own logits, which have no bias: the one threshold of the config was fitted, "
      "for all "
      "layers together."};
}

std::string QuantizationReport::table() const {
  // Both errors as roots of a share of squares; of experts the root of their mean share.
  std::string text;
  if (!made.matrices.empty())
    text += fmt::format("{:<48} {:>15} {:>9} {:>9} {:>9}\n", "", "tokens", "by", "weights %", "outputs %");
  for (const Line& line : lines_of(made.matrices)) {
    const std::string tokens =
        line.least == line.most ? fmt::format("{}", line.most) : fmt::format("{}-{}", line.least, line.most);
    const bool all = line.by_gptq == line.matrices, none = line.by_gptq == 0;
    text += fmt::format("{:<48} {:>15} {:>9} {:>9.2f} {:>9.2f}\n", line.parameter, tokens,
                        all    ? "gptq"
                        : none ? "rtn"
                               : fmt::format("gptq {}/{}", line.by_gptq, line.matrices),
                        100 * std::sqrt(line.weight_error / line.matrices),
                        100 * std::sqrt(line.output_error / line.matrices));
  }
  text += fmt::format(
      "Calibrated on {} tokens in sequences of {}{}. Loss on {} held-out tokens: {:.4f} before, {:.4f} now "
      "(perplexity {:.3f}, {:.3f}).\n",
      calibration.tokens.size(), calibration.seq,
      std::ssize(calibration.tokens) > calibration.wanted
          ? fmt::format(" ({}, and more for what sees few of them)", calibration.wanted)
          : "",
      compared.tokens, compared.loss_before, compared.loss_after, std::exp(compared.loss_before),
      std::exp(compared.loss_after));
  for (const ComparedDecisions& d : compared.decisions) {
    text += fmt::format("layer {}{} {:.2f} % of the tokens, {:.2f} % before; {:.2f} % decided otherwise\n",
                        d.layer, d.of_experts ? ": an expert takes, on average," : ": takes",
                        100 * d.share_after, 100 * d.share_before, 100 * d.flipped);
  }
  for (const RefittedThreshold& t : made.thresholds) {
    const std::string expert = t.expert >= 0 ? fmt::format(", expert {}", t.expert) : "";
    text += t.layer < 0 ? fmt::format("threshold now {:.4f}", made.rule->threshold)
                        : fmt::format("layer {}{}: bias shifted by {:+.4f}", t.layer, expert, t.shift);
    text += fmt::format(": takes {:.2f} % of the calibration, {:.2f} % without, {:.2f} % before\n",
                        100 * t.share_after, 100 * t.share_unfitted, 100 * t.share_before);
  }
  for (const std::string& note : notes()) text += note + "\n";
  for (const std::string& warning : warnings()) text += warning + "\n";
  return text;
}

}  // namespace fathom::app
