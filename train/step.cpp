#include "train/step.h"

#include <cmath>
#include <utility>
#include <variant>

#include <fmt/format.h>

#include "kernels/capture.h"
#include "kernels/error.h"
#include "src/autograd/tape.h"
#include "train/expert_stats.h"
#include "train/signals.h"

namespace fathom {

namespace {

constexpr std::int64_t kSummary = 8;  // elements of a router's summary

// Whether what experts choose is foretold, and so can be right or wrong.
bool experts_foretold(const RoutingConfig& routing) {
  return routing.experts_choose() && !routing.needs_future();
}

}  // namespace

bool StepOutcome::finite() const {
  return std::isfinite(loss) && std::isfinite(aux) && std::isfinite(predictor) && std::isfinite(balance) &&
         std::isfinite(z) && std::isfinite(expert_aux) && std::isfinite(expert_predictor) &&
         std::isfinite(norms.model) && std::isfinite(norms.predictor);
}

StepRunner::StepRunner(Context& c, Transformer& model, const Config& config, Source source)
    : context_(c), model_(model), config_(config), source_(std::move(source)), memory_(c.allocator().pool()) {
  const auto layers = static_cast<std::int64_t>(model.routed_layers().size());
  const auto experts = static_cast<std::int64_t>(model.expert_layers().size());
  const std::int64_t of_experts = kExpertStats + (experts_foretold(config.routing) ? kSummary : 0);
  report_ = c.zeros({config.accumulation() * model.loss_slots() + kSummary * layers + of_experts * experts +
                     static_cast<std::int64_t>(kParameterGroups)},
                    c.stat_dtype());
}

std::vector<HostBatch> StepRunner::host_batches(std::int64_t first_sequence) const {
  const std::int64_t micro = config_.micro_batch_sequences();
  std::vector<HostBatch> batches;
  for (std::int64_t part = 0; part < config_.accumulation(); ++part) {
    batches.push_back(source_(first_sequence + part * micro, micro));
  }
  return batches;
}

void StepRunner::load(std::int64_t first_sequence) {
  if (next_.first != first_sequence) next_ = {first_sequence, host_batches(first_sequence)};
  for (std::size_t i = 0; i < next_.batches.size(); ++i) {
    if (i < batches_.size()) {
      upload_over(context_, next_.batches[i], batches_[i]);
    } else {
      batches_.push_back(upload(context_, next_.batches[i]));
    }
  }
}

std::optional<StepOutcome> StepRunner::gradients(std::int64_t step, std::int64_t first_sequence) {
  load(first_sequence);
  as_one_ = false;
  if (!launch(step)) return std::nullopt;
  if (!context_.backend().is_cpu()) {  // the device is busy now, the host is not
    const std::int64_t after = first_sequence + config_.accumulation() * config_.micro_batch_sequences();
    next_ = {after, host_batches(after)};
  }
  return read(step);
}

bool StepRunner::launch(std::int64_t step) {
  Backend& backend = context_.backend();
  // Noise is drawn by the step's number, which a captured launch could not change.
  const bool fixed = !std::holds_alternative<Stochastic>(training_rule(config_.routing, config_.seed, 0));
  if (!backend.can_capture() || !fixed || context_.traces_nonfinite()) return record_step(step);
  if (stop_requested()) return false;
  if (captured_) {
    as_one_ = true;
    captured_->launch();
    return true;
  }
  // The first step runs op by op: it makes every choice and every block of memory that the others need.
  if (launched_++ == 0) return record_step(step);
  bool whole = false;
  std::unique_ptr<CapturedWork> recorded = capture(backend, [&] { whole = record_step(step); });
  if (!whole) return false;
  captured_ = std::move(recorded);
  as_one_ = true;
  captured_->launch();
  return true;
}

bool StepRunner::record_step(std::int64_t step) {
  const MemoryScope memory(context_, memory_);
  const std::int64_t parts = config_.accumulation();
  const double weight = 1.0 / static_cast<double>(parts);
  const std::int64_t slots = model_.loss_slots();
  const SelectionRule rule = training_rule(config_.routing, config_.seed, static_cast<std::uint64_t>(step));
  begin_gradients(context_, model_.parameters());
  for (std::int64_t part = 0; part < parts; ++part) {
    if (stop_requested()) return false;
    const Batch& batch = batches_[static_cast<std::size_t>(part)];
    Tape tape(context_);
    {
      const Recording recording(context_, tape);
      const ForwardResult result = model_.forward(context_, batch, rule);
      model_.record_objective(context_, batch, result, weight,
                              report_.rows(part * slots, (part + 1) * slots));
      std::int64_t at = parts * slots;
      for (const RoutedLayer& routed : result.routing) {
        if (part + 1 < parts) break;  // the last micro-batch speaks for the step
        record_summary(context_, routed, config_.routing, report_.rows(at, at + kSummary));
        at += kSummary;
      }
      for (const ExpertLayer& experts : result.experts) {
        if (part + 1 < parts) break;
        record_expert_stats(context_, experts, report_.rows(at, at + kExpertStats));
        at += kExpertStats;
        if (!experts_foretold(config_.routing)) continue;
        record_summary(context_, experts, config_.routing, report_.rows(at, at + kSummary));
        at += kSummary;
      }
    }
    tape.backward();
  }
  settle_gradients(context_, model_.parameters());
  AdamW::record_norms(
      context_, model_.parameters(),
      report_.rows(report_.size() - static_cast<std::int64_t>(kParameterGroups), report_.size()));
  return true;
}

std::vector<double> StepRunner::read_report(std::int64_t step) const {
  try {
    return to_doubles(context_.backend(), report_);
  } catch (const DeviceError& e) {
    // Nothing within captured work is checked by itself, so its faults come to light here.
    if (!as_one_) throw;
    throw DeviceError(
        fmt::format("Step {} (captured: forward, backward, norms) failed, or the update before it: {}",
                    step + 1, e.what()));
  }
}

StepOutcome StepRunner::read(std::int64_t step) const {
  const std::vector<double> values = read_report(step);
  const std::int64_t parts = config_.accumulation();
  const auto layers = static_cast<std::int64_t>(model_.routed_layers().size());
  const std::int64_t rows = config_.micro_batch_sequences() * config_.train.seq_len;
  StepOutcome outcome;
  const double* at = values.data();
  for (std::int64_t part = 0; part < parts; ++part, at += model_.loss_slots()) {
    const LossSums sums = loss_sums_of(at, model_.loss_layers(), rows);
    const double all = static_cast<double>(rows) * static_cast<double>(parts);
    outcome.loss += sums.cross_entropy / all;
    outcome.aux += sums.aux / all;
    outcome.predictor += sums.predictor / all;
    outcome.balance += sums.balance / all;
    outcome.z += sums.z / all;
    outcome.expert_aux += sums.expert_aux / all;
    outcome.expert_predictor += sums.expert_predictor / all;
  }
  for (std::int64_t i = 0; i < layers; ++i, at += kSummary) outcome.routing.push_back(summary_of(at));
  for (std::size_t i = 0; i < model_.expert_layers().size(); ++i) {
    outcome.experts.push_back(expert_stats_of(at));
    at += kExpertStats;
    if (!experts_foretold(config_.routing)) continue;
    outcome.expert_routing.push_back(summary_of(at));
    at += kSummary;
  }
  outcome.norms = AdamW::norms_of(at);
  return outcome;
}

std::string StepRunner::trace(std::int64_t step, std::int64_t first_sequence) {
  for (const ParameterSpec& spec : model_.parameters().specs()) {
    if (context_.backend().count_nonfinite(model_.parameters().get(spec.name)) > 0) {
      return fmt::format("the parameter {} was not finite before the step", spec.name);
    }
  }
  context_.trace_nonfinite(true);
  const bool whole = gradients(step, first_sequence).has_value();
  std::string found = whole ? "no single op (the values overflow only in a sum over the whole model)"
                            : "not looked for (a signal came first)";
  if (const NonFinite* culprit = context_.found_nonfinite()) {
    found = fmt::format("{}{} ({} of its values)", culprit->op,
                        culprit->layer.empty() ? "" : " of " + culprit->layer, culprit->count);
  }
  context_.trace_nonfinite(false);
  return found;
}

}  // namespace fathom
