// Records as lines for people: every number has its unit.
#include <numeric>
#include <optional>
#include <vector>

#include <fmt/format.h>

#include "src/core/units.h"
#include "train/metrics/console.h"

namespace fathom {
namespace {

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

std::string percents(const std::vector<double>& shares) {
  std::string out;
  for (const double share : shares) out += fmt::format("{}{:.1f}", out.empty() ? "" : " ", 100.0 * share);
  return out + " %";
}

// Seconds left; empty when unknown. The first step is no measure of the others: on a GPU kernels are chosen
// and plans are made in it.
std::optional<double> seconds_left(const StepRecord& r, std::int64_t total_steps) {
  if (r.step <= 1 || r.step >= total_steps || !(r.tokens_per_s > 0.0)) return std::nullopt;
  const double tokens_per_step = static_cast<double>(r.tokens) / static_cast<double>(r.step);
  return static_cast<double>(total_steps - r.step) * tokens_per_step / r.tokens_per_s;
}

// "3 min 05 s" as "3m05s".
std::string compact(std::string duration) {
  std::erase(duration, ' ');
  const std::size_t minutes = duration.find("min");
  return minutes == std::string::npos ? duration : duration.replace(minutes, 3, "m");
}

// What a live line may say, the most important first.
std::vector<std::string> live_fields(const StepRecord& r, std::int64_t total_steps) {
  std::vector<std::string> fields;
  fields.push_back(total_steps > 0 ? fmt::format("{}/{}", r.step, total_steps)
                                   : fmt::format("step {}", r.step));
  fields.push_back(fmt::format("loss {:.4f}", r.loss));
  if (const auto left = seconds_left(r, total_steps))
    fields.push_back("ETA " + compact(format_duration(*left)));
  fields.push_back(format_count(r.tokens_per_s) + " tok/s");
  fields.push_back(fmt::format("grad {:.3g}", r.grad_norm));
  if (!r.routed_fraction.empty()) fields.push_back("routed " + format_percent(mean(r.routed_fraction)));
  fields.push_back(fmt::format("lr {:.2e}", r.lr));
  if (r.mfu) fields.push_back("MFU " + format_percent(*r.mfu));
  if (r.loss_average) fields.push_back(fmt::format("avg {:.4f}", *r.loss_average));
  if (r.memory_bytes) fields.push_back("memory " + format_bytes(*r.memory_bytes));
  if (r.predictor_accuracy) fields.push_back("predictor " + format_percent(*r.predictor_accuracy));
  fields.push_back(format_rate(r.flops_per_s));
  return fields;
}

}  // namespace

std::string format_step(const StepRecord& r, std::int64_t total_steps) {
  std::string out = fmt::format("step {}", r.step);
  if (total_steps > 0) out += fmt::format("/{}", total_steps);
  out += fmt::format("  loss {:.4f}", r.loss);
  if (r.loss_average) out += fmt::format(" (avg {:.4f})", *r.loss_average);
  if (const auto left = seconds_left(r, total_steps)) out += "  ETA " + format_duration(*left);
  out += fmt::format("  {} tok/s  {}", format_count(r.tokens_per_s), format_rate(r.flops_per_s));
  if (r.mfu) out += fmt::format("  MFU {}", format_percent(*r.mfu));
  out += fmt::format("  lr {:.2e}  grad norm {:.3g}", r.lr, r.grad_norm);
  if (!r.routed_fraction.empty()) out += fmt::format("  routed {}", format_percent(mean(r.routed_fraction)));
  if (r.predictor_accuracy) out += fmt::format("  predictor {}", format_percent(*r.predictor_accuracy));
  if (r.expert_accuracy) out += fmt::format("  experts foretold {}", format_percent(*r.expert_accuracy));
  if (r.memory_bytes) out += "  memory " + format_bytes(*r.memory_bytes);
  return out;
}

std::string format_live_step(const StepRecord& r, std::int64_t total_steps, int width) {
  std::string line;
  for (const std::string& field : live_fields(r, total_steps)) {
    if (line.empty()) {
      line = cut_to_width(field, width);
    } else if (static_cast<int>(line.size() + field.size()) + 2 <= width) {
      line += "  " + field;
    }
  }
  return line;
}

std::string format_evaluation(const EvalRecord& r) {
  std::string out = fmt::format("evaluation at step {}:", r.step);
  if (r.val_loss) out += fmt::format("  val loss {:.4f}", *r.val_loss);
  if (r.val_topk) out += fmt::format("  val top-k {:.4f}", *r.val_topk);
  if (r.val_causal) out += fmt::format("  val causal {:.4f}", *r.val_causal);
  if (r.val_topk && r.val_causal) out += fmt::format(" (gap {:+.4f})", *r.val_causal - *r.val_topk);
  out += " nats/token";
  if (r.bits_per_byte) out += fmt::format("  {:.4f} bits/byte", *r.bits_per_byte);
  if (!r.realised_capacity.empty()) out += "  realised capacity by layer " + percents(r.realised_capacity);
  if (r.router_recall) out += "  recall " + format_percent(*r.router_recall);
  if (r.router_precision) out += "  precision " + format_percent(*r.router_precision);
  if (!r.expert_capacity.empty()) {
    out += "  experts a token by layer";
    for (const std::vector<double>& taken : r.expert_capacity) {
      out += fmt::format(" {:.2f}", std::accumulate(taken.begin(), taken.end(), 0.0));
    }
  }
  if (r.expert_recall) out += "  experts' recall " + format_percent(*r.expert_recall);
  if (r.expert_precision) out += "  experts' precision " + format_percent(*r.expert_precision);
  if (r.causal_flops_per_token) out += "  causal " + format_flops(*r.causal_flops_per_token) + "/token";
  return out;
}

std::string format_event(const EventRecord& r) {
  std::string out = name_of(r.kind);
  if (r.status) out += fmt::format(" ({})", name_of(*r.status));
  out += fmt::format(" at step {}, {}", r.step, format_duration(r.seconds));
  if (r.facts && !r.facts->device.empty()) out += ", on " + r.facts->device;
  if (!r.checkpoint.empty()) out += ": " + r.checkpoint;
  if (r.best_val_loss) out += fmt::format("  best val loss {:.4f} nats/token", *r.best_val_loss);
  if (r.best_val_loss && r.best_step) out += fmt::format(" at step {}", *r.best_step);
  if (!r.message.empty()) out += ": " + r.message;
  return out;
}

std::string cut_to_width(const std::string& text, int width) {
  const auto starts_character = [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; };
  int columns = 0;
  std::size_t keep = 0;  // bytes of the first width - 1 characters
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (!starts_character(text[i])) continue;
    if (columns == width - 1) keep = i;
    ++columns;
  }
  if (columns <= width) return text;
  if (width < 1) return "";
  return text.substr(0, keep) + "…";
}

}  // namespace fathom
