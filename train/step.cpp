#include "train/step.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <variant>

#include <fmt/format.h>

#include "kernels/capture.h"
#include "kernels/error.h"
#include "src/autograd/tape.h"
#include "src/core/stopwatch.h"
#include "train/expert_stats.h"
#include "train/signals.h"

namespace fathom {

namespace {

constexpr std::int64_t kSummary = 8;  // elements of a router's summary
constexpr auto kGroups = static_cast<std::int64_t>(kParameterGroups);
constexpr std::size_t kMostLaunched = 2;  // and not read

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

StepRunner::StepRunner(Context& c, Transformer& model, AdamW& optimizer, const Config& config, Source source,
                       std::shared_ptr<Ranks> ranks)
    : context_(c),
      model_(model),
      optimizer_(optimizer),
      config_(config),
      source_(std::move(source)),
      ranks_(std::move(ranks)),
      memory_(c.allocator().pool()) {
  report_ = c.zeros({losses() + kGroups + 1 + ranks_->size() * summaries()}, c.stat_dtype());
  mean_ = c.empty({kLossMeanNumbers}, DType::F64);
  streams_ = c.empty({1}, DType::I64);
  if (!ranks_->alone() && config.train.reduction == "bf16")
    sent_ = c.empty({model.parameters().gradients().size()}, DType::BF16, MemoryTag::Gradients);
  const std::size_t bytes = static_cast<std::size_t>(report_.size()) * size_of(report_.dtype());
  for (std::size_t i = 0; i < kMostLaunched; ++i) readbacks_.push_back(c.backend().make_readback(bytes));
}

// What was launched reads and writes memory that is about to go.
StepRunner::~StepRunner() {
  if (flights_.empty()) return;
  try {
    context_.backend().synchronize();
  } catch (...) {  // NOLINT: it was about to be thrown away
  }
}

StepRule StepRunner::rule() const {
  StepRule r;
  r.parts = config_.accumulation();
  r.slots = model_.loss_slots();
  r.rows = config_.micro_batch_sequences() * config_.train.seq_len;
  r.grad_clip = config_.train.grad_clip;
  r.spike_factor = config_.train.spike_factor;
  r.refuses_spikes = config_.train.on_spike != OnSpike::Warn;
  return r;
}

bool StepRunner::draws_noise() const {
  return std::holds_alternative<Stochastic>(training_rule(config_.routing, config_.seed, 0));
}

std::int64_t StepRunner::summaries() const {
  const auto layers = static_cast<std::int64_t>(model_.routed_layers().size());
  const auto experts = static_cast<std::int64_t>(model_.expert_layers().size());
  const std::int64_t of_experts = kExpertStats + (experts_foretold(config_.routing) ? kSummary : 0);
  return kSummary * layers + of_experts * experts;
}

Tensor StepRunner::own_summaries() const {
  const std::int64_t begin = losses() + kGroups + 1 + ranks_->rank() * summaries();
  return report_.rows(begin, begin + summaries());
}

std::vector<HostBatch> StepRunner::host_batches(std::int64_t first_sequence) const {
  const std::int64_t micro = config_.micro_batch_sequences();
  const std::int64_t first = first_sequence + ranks_->rank() * own_sequences();
  std::vector<HostBatch> batches;
  for (std::int64_t part = 0; part < config_.accumulation(); ++part) {
    batches.push_back(source_(first + part * micro, micro));
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

void StepRunner::prepare(const StepStart& start) {
  Backend& backend = context_.backend();
  optimizer_.prepare(context_, start.lr, start.step + 1);
  if (flights_.empty())
    from_host<double>(backend, mean_, {start.mean.mean, start.mean.steps, start.mean.halted});
  if (draws_noise()) {
    const std::uint64_t first = first_stream(static_cast<std::uint64_t>(start.step));
    from_host<std::int64_t>(backend, streams_, {static_cast<std::int64_t>(first)});
  }
}

bool StepRunner::launch(const StepStart& start) {
  if (flights_.size() >= kMostLaunched || (!flights_.empty() && !runs_ahead()))
    throw InternalError("[step] launched before the one before it was read");
  if (ranks_->stop_requested_before(start.step, start.mean.mean)) return false;
  Flight flight{start.step, false, next_readback_ % kMostLaunched};
  try {
    load(start.first_sequence);
    prepare(start);
    if (!run(flight)) return false;
    readbacks_[flight.readback]->begin(report_.data());
  } catch (const DeviceError& e) {
    fail(e, flights_.empty() ? flight : flights_.front(), flight.step);
  }
  ++next_readback_;
  flights_.push_back(flight);
  if (!context_.backend().is_cpu()) {  // the device is busy now, the host is not
    const std::int64_t after = start.first_sequence + ranks_->size() * own_sequences();
    next_ = {after, host_batches(after)};
  }
  return true;
}

bool StepRunner::launched(std::int64_t step) const {
  return std::any_of(flights_.begin(), flights_.end(), [step](const Flight& f) { return f.step == step; });
}

bool StepRunner::run(Flight& flight) {
  Backend& backend = context_.backend();
  const auto all = [&] {
    GradientReduction reduction(context_, ranks_->comm(), model_.parameters(), optimizer_.shards(), sent_);
    if (!record_gradients(flight.step, &reduction)) return false;
    reduction.finish();
    exchange_losses();
    record_update();
    return true;
  };
  // The first step runs op by op: it makes every choice and every block of memory that the others need.
  if (!backend.can_capture() || !std::exchange(warm_, true)) return all();
  if (!captured_) {
    bool whole = false;
    std::unique_ptr<CapturedWork> recorded = capture(backend, [&] { whole = all(); });
    if (!whole) return false;
    captured_ = std::move(recorded);
  }
  flight.as_one = true;
  captured_->launch();
  return true;
}

bool StepRunner::record_gradients(std::int64_t step, GradientReduction* reduction) {
  const MemoryScope memory(context_, memory_);
  const Stopwatch watch;
  const std::int64_t parts = config_.accumulation();
  const double weight = 1.0 / static_cast<double>(parts * ranks_->size());
  const std::int64_t slots = model_.loss_slots();
  const Tensor summed = own_summaries();
  SelectionRule rule = training_rule(config_.routing, config_.seed, static_cast<std::uint64_t>(step));
  auto* stochastic = std::get_if<Stochastic>(&rule);
  if (stochastic != nullptr) stochastic->streams_there = streams_;
  begin_gradients(context_, model_.parameters());
  for (std::int64_t part = 0; part < parts; ++part) {
    if (ranks_->alone() && ranks_->stop_requested()) return false;
    if (stochastic != nullptr)
      stochastic->first = ranks_->rank() * own_sequences() + part * config_.micro_batch_sequences();
    const Batch& batch = batches_[static_cast<std::size_t>(part)];
    Tape tape(context_);
    {
      const Recording recording(context_, tape);
      const ForwardResult result = model_.forward(context_, batch, rule);
      model_.record_objective(context_, batch, result, weight,
                              report_.rows(part * slots, (part + 1) * slots));
      std::int64_t at = 0;
      for (const RoutedLayer& routed : result.routing) {
        if (part + 1 < parts) break;  // the last micro-batch speaks for the step
        record_summary(context_, routed, config_.routing, summed.rows(at, at + kSummary));
        at += kSummary;
      }
      for (const ExpertLayer& experts : result.experts) {
        if (part + 1 < parts) break;
        record_expert_stats(context_, experts, summed.rows(at, at + kExpertStats));
        at += kExpertStats;
        if (!experts_foretold(config_.routing)) continue;
        record_summary(context_, experts, config_.routing, summed.rows(at, at + kSummary));
        at += kSummary;
      }
    }
    const bool reduces = reduction != nullptr && !ranks_->alone() && part + 1 == parts;
    if (reduces) {
      tape.backward([reduction](const std::string& layer) { reduction->layer_done(layer); });
    } else {
      tape.backward();
    }
  }
  settle_gradients(context_, model_.parameters());
  // A device works on while the host goes on, which cannot tell how long.
  if (context_.backend().is_cpu())
    ranks_->note_work(watch.seconds() - (reduction != nullptr ? reduction->seconds() : 0));
  return true;
}

void StepRunner::exchange_losses() {
  Communicator& comm = ranks_->comm();
  optimizer_.record_own_norms(context_, model_.parameters(), report_.rows(losses(), losses() + kGroups));
  if (comm.alone()) return;
  comm.all_reduce(report_.rows(0, losses() + kGroups));
  if (summaries() > 0) {
    const std::vector<std::int64_t> counts(static_cast<std::size_t>(comm.size()), summaries());
    comm.all_gather(report_.rows(losses() + kGroups + 1, report_.size()), counts);
  }
  comm.finish();
  context_.backend().scale(report_.rows(0, losses()), 1.0 / static_cast<double>(comm.size()));
}

void StepRunner::record_update() {
  const std::int64_t squares = losses(), verdict = squares + kGroups;
  context_.backend().judge_step(optimizer_.numbers(), mean_, report_.rows(verdict, verdict + 1),
                                report_.rows(0, squares), report_.rows(squares, verdict), rule());
  optimizer_.record_update(context_, model_.parameters());
  gather_weights(ranks_->comm(), model_.parameters(), optimizer_.shards());
}

// Nothing within captured work is checked by itself, so its faults come to light where the host meets the
// device next: at its report, or while the step behind it is launched.
void StepRunner::fail(const DeviceError& e, const Flight& first, std::int64_t last) const {
  if (!first.as_one) throw;
  throw DeviceError(fmt::format("Step {}{} (captured: forward, backward, norms, update) failed: {}",
                                first.step + 1, last > first.step ? fmt::format(" or {}", last + 1) : "",
                                e.what()));
}

std::vector<double> StepRunner::wait_for(const Flight& flight) {
  try {
    const void* report = readbacks_[flight.readback]->wait();
    const auto n = report_.size();
    if (report_.dtype() == DType::F64) {
      const auto* values = static_cast<const double*>(report);
      return {values, values + n};
    }
    const auto* values = static_cast<const float*>(report);
    return {values, values + n};
  } catch (const DeviceError& e) {
    fail(e, flight, flights_.back().step);
  }
}

StepOutcome StepRunner::read() {
  if (flights_.empty()) throw InternalError("[step] read before it was launched");
  const std::vector<double> report = wait_for(flights_.front());
  flights_.pop_front();
  return outcome_of(report);
}

void StepRunner::forget() {
  for (; !flights_.empty(); flights_.pop_front()) wait_for(flights_.front());
}

StepOutcome StepRunner::outcome_of(const std::vector<double>& values) const {
  const std::int64_t parts = config_.accumulation();
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
  outcome.norms = AdamW::norms_of(at);
  outcome.applied = at[kGroups] != 0;
  at += kGroups + 1;
  const auto of_ranks = [&](auto of) {
    std::vector<decltype(of(at))> all;
    for (int r = 0; r < ranks_->size(); ++r) all.push_back(of(at + r * summaries()));
    return over_ranks(all);
  };
  for (std::size_t i = 0; i < model_.routed_layers().size(); ++i, at += kSummary)
    outcome.routing.push_back(of_ranks(summary_of));
  for (std::size_t i = 0; i < model_.expert_layers().size(); ++i) {
    outcome.experts.push_back(of_ranks(expert_stats_of));
    at += kExpertStats;
    if (!experts_foretold(config_.routing)) continue;
    outcome.expert_routing.push_back(of_ranks(summary_of));
    at += kSummary;
  }
  return outcome;
}

std::string StepRunner::trace(std::int64_t step, std::int64_t first_sequence) {
  for (const ParameterSpec& spec : model_.parameters().specs()) {
    if (context_.backend().count_nonfinite(model_.parameters().get(spec.name)) > 0) {
      return fmt::format("the parameter {} was not finite before the step", spec.name);
    }
  }
  load(first_sequence);
  prepare({step, first_sequence, 0.0, {}});
  context_.trace_nonfinite(true);
  const bool whole = record_gradients(step, nullptr);
  std::string found =
      whole ? fmt::format("{} (the values overflow only in a sum over the whole model)", kNoSingleOp)
            : "not looked for (a signal came first)";
  if (const NonFinite* culprit = context_.found_nonfinite()) {
    found = fmt::format("{}{} ({} of its values)", culprit->op,
                        culprit->layer.empty() ? "" : " of " + culprit->layer, culprit->count);
  }
  context_.trace_nonfinite(false);
  return found;
}

}  // namespace fathom
